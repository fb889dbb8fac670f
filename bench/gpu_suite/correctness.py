"""Step "correctness": forward, backward, LoRA, 8-bit experts, gate and decode sizes against float64, row by row.

A quarter of Gemma-4's H and I and its ratio of E to K, so that every token and every expert can be compared. The
criterion is the benchmark's: at most twice the error of transformers' eager path in the same dtype. In every case a
result that is wrong on purpose has to fail it.
"""

import functools
from typing import Any

import torch

from omnigene_fast import ops

from .. import checks
from ..providers import OURS, OURS_INPUT, ROUTES, Missing, Output, build, trace_buffers
from ..training import TRAINING_OPS
from ..workloads import EPS, Layer
from . import cases, status

OPS = (
    *("experts", "route", "route_traced", "block", "experts_frozen", "experts_full", "experts_lora16"),
    *("experts_int8", "experts_fp8"),
)
TOKENS = {"experts": (1, 2, 7, 16, 17, 129, 511), "route": (1, 7, 255, 256, 511), "route_traced": (1, 256)}
OTHERS = (1, 17, 129)


def run(context: status.Context) -> str | None:
    """Check every case; the sentence names those that fail."""
    shape = cases.TINY_SHAPE if context.tiny else cases.SMALL_SHAPE
    layer = functools.cache(lambda dtype: Layer(shape, dtype, context.device))
    wanted = {}
    for dtype in (torch.bfloat16, torch.float32):
        for op in OPS:
            for tokens in TOKENS.get(op, OTHERS)[: 2 if context.tiny else None]:
                for mode in ("uniform", "protein") if dtype == torch.bfloat16 else ("uniform",):
                    wanted[f"{op} {mode} T={tokens} {str(dtype).removeprefix('torch.')}"] = (op, dtype, mode, tokens)

    def work(name: str) -> dict[str, Any]:
        op, dtype, mode, tokens = wanted[name]
        with torch.no_grad():
            return check(op, layer(dtype), mode, tokens)

    return status.problems(status.each(context, context.out / "correctness.json", wanted, work))


def check(op: str, layer: Layer, mode: str, tokens: int) -> dict[str, Any]:
    """Errors of ours and of eager in one case, and what is wrong with it, "" if nothing."""
    draw, proj = next(layer.draws(mode, tokens, 1)), layer.projection(mode)
    visits = torch.bincount(draw.index.flatten(), minlength=layer.shape.E).cpu()
    hit, empty = visits.nonzero().flatten(), (visits == 0).nonzero().flatten()
    picked = checks.Sample(torch.arange(tokens), hit, empty)
    expected = checks.truth(op, layer, draw, proj, picked)
    eager = checks.eager_errors(op, layer, draw, proj, expected, picked)
    found: dict[str, Any] = {"eager": eager, "problem": ""}
    for provider in build(op, layer, (OURS, OURS_INPUT)):
        assert not isinstance(provider, Missing)
        try:
            provider.prepare(proj)
            output = provider.call(draw)
            error = checks.errors(op, layer, output, expected, picked)
        except Exception as crash:  # that is this case's result
            found["problem"] = f"{provider.name}: {status.sentence(crash)}"
            continue
        found[provider.name] = error
        if not checks.passes(error, eager, layer.dtype):
            found["problem"] = f"{provider.name}: error {max(error.values()):.1e}, eager {max(eager.values()):.1e}"
        elif checks.passes(checks.errors(op, layer, spoiled(op, output), expected, picked), eager, layer.dtype):
            found["problem"] = "a result that is wrong on purpose passes the check"
    if op == "route_traced" and not found["problem"]:
        found["problem"] = _trace(layer, draw.hidden, proj)
    return found


def spoiled(op: str, output: Output) -> Output:
    """`output` with the weights of the picks in another order, or 5 % too large."""
    if op in ROUTES:
        assert isinstance(output, tuple)
        return output[0], output[1].roll(1, 1), output[2]
    if op in TRAINING_OPS:
        assert isinstance(output, dict)
        return output | {"d_hidden": output["d_hidden"] * 1.05}
    assert isinstance(output, torch.Tensor)
    return output * 1.05


def _trace(layer: Layer, hidden: torch.Tensor, proj: torch.Tensor) -> str:
    """Whether what the gate wrote into a trace is what it returned."""
    buffers = trace_buffers(layer, len(hidden))
    scales = (layer.scale, layer.per_expert_scale)
    _, weights, index = ops.route(hidden, proj, *scales, top_k=layer.shape.K, eps=EPS, trace=buffers)
    if not torch.equal(buffers.ids.long(), index):
        return "the ids in the trace are not those that were returned"
    if buffers.weights is None or not torch.equal(buffers.weights, weights.half()):
        return "the weights in the trace are not those that were returned"
    return ""
