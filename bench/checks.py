"""Is a provider right? Its output on a case's own input against the float64 reference, before it is timed.

Criterion, per tensor: ‖out - truth‖ / ‖truth‖ at most twice the same figure of transformers' eager path in the same
dtype, plus a floor of 1e-6 in float32. The bench's tokens keep a distance between their 8th and 9th logit, so the sets
of experts must be equal.
"""

import math

import torch
from torch import Tensor

from omnigene_fast import reference

from .providers import Output, truth_norm
from .workloads import EPS, Draw, Layer

SAMPLE = 8  # tokens compared per case: at most 64 experts are widened to float64
FACTOR = 2.0


def sample(tokens: int) -> Tensor:
    """Up to `SAMPLE` token numbers, spread evenly with both ends."""
    return torch.linspace(0, tokens - 1, min(tokens, SAMPLE)).round().long().unique()


def truth(op: str, layer: Layer, draw: Draw, proj: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The float64 result of `op` for the tokens `rows` of `draw`, as a dict of tensors by name."""
    rows = rows.to(draw.hidden.device)
    if op == "experts":
        out = _experts(layer, draw.normed[rows].double(), draw.index[rows], draw.weights[rows].double())
        return {"out": out}
    hidden = draw.hidden[rows].double()
    probabilities, weights, index = reference.route(
        hidden,
        proj.double(),
        layer.scale.double(),
        layer.per_expert_scale.double(),
        top_k=layer.shape.K,
        eps=EPS,
    )
    if op == "route":
        return {"probabilities": probabilities, "weights": _dense(weights, index, layer.shape.E)}
    return {"out": _experts(layer, truth_norm(layer, hidden), index, weights)}


def errors(op: str, layer: Layer, output: Output, expected: dict[str, Tensor], rows: Tensor) -> dict[str, float]:
    """Relative error of each tensor of `output` at the tokens `rows`; infinite where shape or finiteness is wrong."""
    found: dict[str, Tensor]
    if op == "route":
        assert isinstance(output, tuple)
        probabilities, weights, index = (tensor[rows.to(tensor.device)] for tensor in output)
        found = {"probabilities": probabilities, "weights": _dense(weights, index, layer.shape.E)}
    else:
        assert isinstance(output, Tensor)
        found = {"out": output[rows.to(output.device)]}
    return {name: _relative(found[name], expected[name]) for name in expected}


def passes(error: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether every error is within the criterion, given those of transformers' eager path."""
    floor = 1e-6 if dtype == torch.float32 else 0.0
    return all(error[name] <= FACTOR * eager[name] + floor for name in eager)


def _experts(layer: Layer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`reference.expert_mlp` in float64, one expert's weights widened at a time."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, pick = torch.where(index == expert)
        out[token] += reference.expert_mlp(
            hidden[token],
            layer.gate_up[expert, None].double(),
            layer.down[expert, None].double(),
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
    error = ((found.double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
