"""Step "repeat": the same bits twenty times, forward and backward, at the true shape."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..providers import OURS, Missing, Output, build
from ..workloads import Layer
from . import cases, status

TIMES = 20
CASES = (
    *(("experts", "uniform", tokens) for tokens in (1, 8, 512, 4096)),
    *(("experts", "protein", tokens) for tokens in (512, 4096)),
    *(("route", "uniform", tokens) for tokens in (1, 16384)),
    *(("experts_full", "protein", 4096), ("experts_frozen", "uniform", 4096), ("experts_lora16", "uniform", 512)),
    *(("experts_int8", "uniform", 64), ("experts_fp8", "uniform", 64)),
)


def run(context: status.Context) -> str | None:
    """Run every case; the sentence names those whose bits changed."""
    layer = Layer(cases.shape_of(context.tiny), torch.bfloat16, context.device)
    wanted = {}
    for op, mode, count in CASES:
        tokens = cases.tokens_of(count, context.tiny)
        wanted[f"{op} {mode} T={tokens}"] = (op, mode, tokens)

    def work(name: str) -> dict[str, Any]:
        op, mode, tokens = wanted[name]
        draw = next(layer.draws(mode, tokens, 1))
        (provider,) = build(op, layer, (OURS,))
        assert not isinstance(provider, Missing)
        provider.prepare(layer.projection(mode))
        with torch.no_grad():
            problem = changed(functools.partial(provider.call, draw))
        layer.low_bits.clear()
        return {"times": TIMES, "problem": problem}

    return status.problems(status.each(context, context.out / "repeat.json", wanted, work))


def changed(call: Callable[[], Output], times: int = TIMES) -> str:
    """Which tensor of `call`'s result had other bits in which run; "" if none had."""
    first = tensors(call())
    for turn in range(1, times):
        for name, tensor in tensors(call()).items():
            if not torch.equal(tensor.view(-1).view(torch.uint8), first[name].view(-1).view(torch.uint8)):
                place = int((tensor != first[name]).flatten().nonzero()[:1].sum())
                return f"{name} differs in run {turn + 1}, first at element {place}"
    return ""


def tensors(output: Output) -> dict[str, Tensor]:
    """The tensors of a provider's result by name, contiguous."""
    if isinstance(output, dict):
        named = dict(output)
    else:
        parts = output if isinstance(output, tuple) else (output,)
        named = {f"result {number}": part for number, part in enumerate(parts)}
    return {name: tensor.contiguous() for name, tensor in named.items()}
