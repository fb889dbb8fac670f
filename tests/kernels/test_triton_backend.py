"""What the Triton backend says of devices that it cannot serve, and what it would launch. Nothing runs a kernel."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omnigene_fast.backends import Lora
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


class Sizes(TorchDispatchMode):
    """Remembers how many elements each new tensor has."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, out.numel())
        return out


DOWN, UP, COMBINE = "expert_down_bwd", "grouped_gemm", "combine_fwd"
NARROW = ["grouped_gemm"]  # rows times a low-rank factor
BACKWARDS = {
    # name: (needed, ranks, launches)
    "nothing": ((0, 0, 0, 0, 0, 0, 0, 0), None, []),
    "frozen": ((1, 0, 0, 1, 0, 0, 0, 0), None, [DOWN, "expert_weights_bwd", UP, COMBINE]),
    "hidden": ((1, 0, 0, 0, 0, 0, 0, 0), None, [DOWN, UP, COMBINE]),
    "weights": ((0, 0, 0, 1, 0, 0, 0, 0), None, [DOWN, "expert_weights_bwd"]),
    "projections": ((0, 1, 1, 0, 0, 0, 0, 0), None, [DOWN, "grouped_gram", "grouped_gram"]),
    "lora, frozen factors": ((1, 0, 0, 0, 0, 0, 0, 0), 16, [*NARROW, DOWN, *NARROW, UP, COMBINE]),
    "lora of down": ((0, 0, 0, 0, 0, 0, 1, 1), 16, [*NARROW, DOWN, *NARROW, "grouped_gram", "grouped_gram"]),
    "lora of gate_up": (
        (0, 0, 0, 0, 1, 1, 0, 0),
        16,
        [*NARROW, *NARROW, DOWN, *NARROW, "grouped_gram", "grouped_gram"],
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", list(BACKWARDS))
def test_only_what_is_needed_is_launched_or_allocated(monkeypatch, name, saved):
    """Known bug: the gradient of frozen weights was computed and dropped. At Gemma-4's sizes, on the meta device."""
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.fn.__name__))
    T, K, E, H, I = 64, 8, 128, 2816, 704  # noqa: E741
    needed, rank, expected = BACKWARDS[name]

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    lora = Lora(None, None, None, None)
    if rank is not None:
        lora = Lora(empty(E, 2 * I, rank), empty(E, rank, H), empty(E, H, rank), empty(E, rank, I))
    inputs = (empty(T, H), empty(E, 2 * I, H), empty(E, H, I), empty(T, K, dtype=torch.int64), empty(T, K))
    pre = empty(T * K, 2 * I) if saved else None
    with Sizes() as sizes:
        grads = backend.expert_mlp_bwd(empty(T, H), *inputs, lora, pre, "gelu_tanh", False, [bool(n) for n in needed])
    for need, grad, x in zip(needed, grads, (*inputs[:3], inputs[4], *lora), strict=True):
        assert (grad.shape == x.shape) if need else grad is None
    if not any(needed):
        assert launched == []
        return
    kernels = [kernel.strip("_").removesuffix("_kernel") for kernel in launched]
    recomputed = [] if saved else [*(NARROW if rank else []), "expert_up_fwd"]
    if not saved and name == "lora of gate_up":
        expected = expected[1:]  # x @ rhs^T serves both
    assert kernels == ["dispatch_fwd", *recomputed, *expected]
    weights = 0 if needed[1] or needed[2] else min(inputs[1].numel(), inputs[2].numel())
    if weights:
        assert sizes.largest < weights / 40  # a gradient of a factor is a 44th
