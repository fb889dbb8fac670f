"""Is a provider right? Its output on a case's own input against the float64 reference, before it is timed.

Criterion, per tensor: ‖out - truth‖ / ‖truth‖ at most twice the same figure of transformers' eager path in the same
dtype, plus a floor of 1e-6 in float32. The bench's tokens keep a distance between their 8th and 9th logit, so the sets
of experts must be equal. Gradients are tensors like the output; `gradients.py` has their truth.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnigene_fast import reference

from . import gradients
from .lowbit import LOW_BIT_OPS, low_bit
from .providers import ROUTES, Output, Provider, build, truth_norm
from .training import TRAINING_OPS
from .workloads import EPS, Draw, Layer

SAMPLE = 8  # tokens compared per case: at most 64 experts are widened to float64
FACTOR = 2.0


class Sample(NamedTuple):
    """What of a case is compared: tokens, and for gradients of weights the experts, visited and not."""

    rows: Tensor
    experts: Tensor
    empty: Tensor


def sample(layer: Layer, draw: Draw) -> Sample:
    """Up to `SAMPLE` token numbers, spread evenly with both ends, and a few experts."""
    tokens = len(draw.index)
    rows = torch.linspace(0, tokens - 1, min(tokens, SAMPLE)).round().long().unique()
    return Sample(rows, *gradients.sample_experts(draw.index, layer.shape.E))


def truth(op: str, layer: Layer, draw: Draw, proj: Tensor, picked: Sample) -> dict[str, Tensor]:
    """The float64 result of `op` for what is `picked` of `draw`, as a dict of tensors by name."""
    if op in TRAINING_OPS:
        expected = gradients.truth(op, layer, draw, picked.rows, picked.experts)
        return _with_empty(op, expected, picked)
    rows = picked.rows.to(draw.hidden.device)
    if op == "experts" or op in LOW_BIT_OPS:
        matrices = _stored(layer, op) if op in LOW_BIT_OPS else _plain(layer)
        return {"out": _experts(matrices, draw.normed[rows].double(), draw.index[rows], draw.weights[rows].double())}
    hidden = draw.hidden[rows].double()
    probabilities, weights, index = reference.route(
        hidden,
        proj.double(),
        layer.scale.double(),
        layer.per_expert_scale.double(),
        top_k=layer.shape.K,
        eps=EPS,
    )
    if op in ROUTES:
        return {"probabilities": probabilities, "weights": _dense(weights, index, layer.shape.E)}
    return {"out": _experts(_plain(layer), truth_norm(layer, hidden), index, weights)}


def errors(op: str, layer: Layer, output: Output, expected: dict[str, Tensor], picked: Sample) -> dict[str, float]:
    """Relative error of each tensor of `output` where it is compared; infinite where shape or finiteness is wrong."""
    found: dict[str, Tensor]
    if op in TRAINING_OPS:
        assert isinstance(output, dict)
        found = gradients.taken(layer, output, *picked)
    elif op in ROUTES:
        assert isinstance(output, tuple)
        probabilities, weights, index = (tensor[picked.rows.to(tensor.device)] for tensor in output)
        found = {"probabilities": probabilities, "weights": _dense(weights, index, layer.shape.E)}
    else:
        assert isinstance(output, Tensor)
        found = {"out": output[picked.rows.to(output.device)]}
    return {name: _relative(found[name], expected[name]) for name in expected}


def eager_errors(
    op: str, layer: Layer, draw: Draw, proj: Tensor, expected: dict[str, Tensor], picked: Sample
) -> dict[str, float]:
    """The errors of transformers' eager path in the layer's dtype: what the criterion measures others by."""
    if op in TRAINING_OPS:
        found: dict[str, Any] = gradients.eager(op, layer, draw, picked.rows, picked.experts)
        found = _with_empty(op, found, picked)
        return {name: _relative(found[name], expected[name]) for name in expected}
    (provider,) = build(op, layer, ("eager",))
    assert isinstance(provider, Provider)
    provider.prepare(proj)
    return errors(op, layer, provider.call(draw), expected, picked)


def passes(error: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether every error is within the criterion, given those of transformers' eager path."""
    floor = 1e-6 if dtype == torch.float32 else 0.0
    return all(error[name] <= FACTOR * eager[name] + floor for name in eager)


def _with_empty(op: str, tensors: dict[str, Tensor], picked: Sample) -> dict[str, Tensor]:
    """With the gradient of the experts that nobody visits: one zero stands for all of it."""
    return tensors if op == "experts_frozen" or not len(picked.empty) else tensors | {"d_empty": torch.zeros(1)}


Matrices = Callable[[int], tuple[Tensor, Tensor]]  # an expert's gate_up [2I, H] and down [H, I] in float64


def _plain(layer: Layer) -> Matrices:
    return lambda expert: (layer.gate_up[expert].double(), layer.down[expert].double())


def _stored(layer: Layer, op: str) -> Matrices:
    """What the 8 bits and their scales stand for, unrounded."""
    low = low_bit(layer, op)

    def matrices(expert: int) -> tuple[Tensor, Tensor]:
        gate_up = reference.dequantise(low.gate_up[expert], low.gate_up_scale[expert], torch.float64)
        return gate_up, reference.dequantise(low.down[expert], low.down_scale[expert], torch.float64)

    return matrices


def _experts(matrices: Matrices, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`reference.expert_mlp` in float64, one expert's weights widened at a time."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, pick = torch.where(index == expert)
        gate_up, down = matrices(expert)
        out[token] += reference.expert_mlp(
            hidden[token],
            gate_up[None],
            down[None],
            torch.zeros(len(token), 1, dtype=torch.long, device=hidden.device),
            weights[token, pick, None],
            activation="gelu_tanh",
        )
    return out


def _dense(weights: Tensor, index: Tensor, experts: int) -> Tensor:
    """[T, K] weights at their experts in [T, E]: comparable whatever the order of the K."""
    return weights.new_zeros(len(weights), experts).scatter_(1, index, weights)


def _relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    off, norm = (found.double() - expected).norm().item(), expected.norm().item()
    error = off / norm if norm else math.inf if off else 0.0  # where nothing belongs, nothing may be
    return error if math.isfinite(error) else math.inf
