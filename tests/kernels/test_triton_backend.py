"""What the Triton backend says of devices that it cannot serve. Nothing here launches a kernel."""

import os
import subprocess
import sys

import pytest
import torch

from omnigene_fast.backends import triton as backend

ASK = """
import importlib.util, sys, torch
from omnigene_fast.backends import triton
print(any(name.startswith("omnigene_fast.kernels") for name in sys.modules))
print(triton.unavailable(torch.device("cpu")))
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
print(triton.unavailable(torch.device("cpu")))
"""


def test_what_it_says_without_a_gpu_and_without_triton():
    """Asked in a process of its own: importing the backend loads no kernel, and each answer names a way out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded, on_cpu, missing = result.stdout.strip().splitlines()
    assert loaded == "False"
    assert "need a CUDA device, got cpu" in on_cpu
    assert "pip install 'omnigene-fast[triton]'" in missing


@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm is refused before the capability is looked at")
def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Tesla T4 has compute capability 7.5" in backend.unavailable(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.unavailable(torch.device("cuda", 0)) is None


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.unavailable(torch.device("cuda"))
