"""Step "sanitizer": compute-sanitizer's memcheck and racecheck over every operation on a few tokens.

    compute-sanitizer --tool memcheck python -m omnigene_fast.bench.gpu_suite.sanitizer

runs the same by hand. torch's caching allocator is off, so that an access past a tensor's end is one past an
allocation.
"""

import sys
from typing import Any

import torch

from omnigene_fast import ops

from ..providers import OURS, Missing, build
from ..workloads import Layer
from . import cases, environment, gpu_tests, status

TOOLS = ("memcheck", "racecheck")
OPS = ("route", "experts", "experts_full", "experts_lora16", "experts_int8", "experts_fp8")
TOKENS = (1, 5, 17)  # decode; decode with experts that several tokens share; beyond decode
FAULT = 99  # compute-sanitizer's exit status if it found something


def run(context: status.Context) -> str | None:
    """Run both tools; the sentence has their summaries if they found anything."""
    program = environment.tool("compute-sanitizer")
    if program is None:
        raise status.MissingTool("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    logs = context.out / "sanitizer"
    logs.mkdir(exist_ok=True)
    variables = gpu_tests.variables() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def work(tool: str) -> dict[str, Any]:
        log = logs / f"{tool}.log"
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            str(FAULT),
            "--log-file",
            str(log),
            "--print-limit",
            "20",
        ]
        command += [sys.executable, "-m", "omnigene_fast.bench.gpu_suite.sanitizer", str(context.device)]
        code = gpu_tests.run_group(command, variables)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = lines[-1].lstrip("= ") if lines else ""
        return {"status": code, "summary": last, "problem": "" if code == 0 else last or f"ended with status {code}"}

    return status.problems(status.each(context, context.out / "sanitizer.json", TOOLS, work))


def exercise(device: torch.device) -> None:
    """Every operation on few tokens of a small layer."""
    layer = Layer(cases.SMALL_SHAPE, torch.bfloat16, device)
    for op in OPS:
        for tokens in TOKENS:
            (provider,) = build(op, layer, (OURS,))
            assert not isinstance(provider, Missing)
            provider.prepare(layer.projection("protein"))
            with torch.no_grad():
                provider.call(next(layer.draws("protein", tokens, 1)))
    # A single pick: decode shares the sum of one pick among several warps where there are few picks.
    draw = next(layer.draws("protein", 1, 1))
    index, weights = draw.index[:, :1].contiguous(), draw.weights[:, :1].contiguous()
    with torch.no_grad():
        ops.expert_mlp(draw.hidden, layer.gate_up, layer.down, index, weights, activation="gelu_tanh")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    exercise(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
