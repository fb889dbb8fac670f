"""Step "environment": device, versions, clocks, what is missing, and what the machine itself can do."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from omnigene_fast import info

from ..providers import GPU_ONLY, installed
from . import cases, revision, status

# What a step does without each of these.
OPTIONAL = {
    "triton": "no Triton kernels",
    "pytest": "no GPU tests",
    "pytest_benchmark": "nothing but the microbenchmarks of bench/bench_ops.py",
    "hypothesis": "the tests over random shapes are left out",
    "peft": "LoRA rows give the factors to the operator; no LoRA on a whole model",
    "cuda.core": "no CUDA C++ kernels",
    "matplotlib": "no plots",
} | {module: f"not compared with {name}" for name, module in GPU_ONLY.items()}
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "clocks_throttle_reasons.active,persistence_mode,mig.mode.current,memory.used,memory.total"
)
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")


def run(context: status.Context) -> str | None:
    """Write environment.json; a slow or a shared GPU is for the reader to see."""
    found: dict[str, Any] = {
        "fields": info.environment(context.device, torch.bfloat16),
        "slug": info.slug(context.device),
        "git": revision.commit(),
        "decode": info._decode(),
        "nvidia_smi": nvidia_smi(context.device),
        "cuda": torch.version.cuda,
        "cpp_module": _cpp_module(),
        "missing": missing(),
        "tools": {name: tool(name) for name in ("compute-sanitizer", "ncu", "nsys", "ptxas")},
        "report": info.report().splitlines(),
    }
    status.save_json(context.out / "environment.json", found)
    probe = cases.probe_of(context.device, context.tiny)
    for _ in range(5):
        probe.sample()
    found["probe"] = {"kind": probe.kind, "bandwidth_gb_s": probe.bandwidth, "peak_gflop_s": probe.peak}
    found["nvidia_smi_after_load"] = nvidia_smi(context.device)
    status.save_json(context.out / "environment.json", found)
    print("\n".join(found["report"]))
    return None


def nvidia_smi(device: torch.device) -> dict[str, str] | str:
    """Clocks, power and the rest of QUERY by name; a sentence if the tool is not there or does not answer.

    The tool numbers all of the machine's GPUs, whatever CUDA_VISIBLE_DEVICES says: the device is asked for by its uuid.
    """
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    if device.type == "cuda" and (uuid := getattr(torch.cuda.get_device_properties(device), "uuid", None)):
        command.append(f"--id=GPU-{str(uuid).removeprefix('GPU-')}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi did not answer: {error}"
    lines = done.stdout.strip().splitlines()
    if not lines:
        return "nvidia-smi did not answer: it names no GPU"
    values = lines[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=False))


def missing() -> dict[str, str]:
    """The optional packages that are not installed, and what is left out without them."""
    return {name: without for name, without in OPTIONAL.items() if not installed(name)}


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, or None."""
    if path := shutil.which(name):
        return path
    places = [Path(place) for place in SANITIZER_PLACES]
    if home := os.environ.get("CUDA_HOME"):
        places += [Path(home) / "bin", Path(home) / "compute-sanitizer"]
    return next((str(place / name) for place in places if os.access(place / name, os.X_OK)), None)


def _cpp_module() -> str:
    isa = info.isa()
    return f"built, {isa}" if isa else "not built: CPU tensors run the reference"
