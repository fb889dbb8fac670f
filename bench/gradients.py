"""The truth of a forward and backward, and the error that transformers' eager path has: one expert at a time.

The output and the gradients of hidden and weights belong to a token, those of the weights (or of the LoRA factors) to
an expert. So a few tokens with all their experts, and a few experts with all their tokens, can be computed in float64
at the case's own size. The same loop with transformers' eager module in place of the reference, in the layer's dtype,
gives eager's error without the full zero gradient that it allocates for every expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from omnigene_fast import reference

from .training import RANKS, SCALING, Gradients, adapted, stock_experts
from .workloads import Draw, Layer

Expert = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x [n, H], gate_up, down, weights [n, 1] -> [n, H]


def sample_experts(index: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Of the experts in `index`: the busiest, the middle and the idlest one; and up to three that nobody visits."""
    counts = torch.bincount(index.flatten(), minlength=E).cpu()
    hit = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return hit[[0, len(hit) // 2, -1]].unique(), (counts == 0).nonzero().flatten()[:3]


def truth(op: str, layer: Layer, draw: Draw, rows: Tensor, experts: Tensor) -> Gradients:
    """In float64, by torch's autograd through `reference.expert_mlp`."""

    def expert(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return reference.expert_mlp(x, gate_up[None], down[None], _first(x), weights, activation="gelu_tanh")

    return _compute(op, layer, draw, rows, experts, torch.float64, expert)


def eager(op: str, layer: Layer, draw: Draw, rows: Tensor, experts: Tensor) -> Gradients:
    """In the layer's dtype, by transformers' eager path."""
    module = stock_experts(layer, "eager", experts=1)

    def expert(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        matrices = {"gate_up_proj": gate_up[None], "down_proj": down[None]}
        return torch.func.functional_call(module, matrices, (x, _first(x), weights))

    return _compute(op, layer, draw, rows, experts, layer.dtype, expert)


def taken(layer: Layer, output: Gradients, rows: Tensor, experts: Tensor, empty: Tensor) -> Gradients:
    """What of a provider's output is compared, under the names of `truth`, and the largest of the `empty` experts'."""
    found = {name: output[name][rows.to(layer.device)] for name in ("out", "d_hidden", "d_weights")}
    E = layer.shape.E
    zeros = []
    for name, gradient in output.items():
        if name in found:
            continue
        if name.endswith("_A"):
            gradient = gradient.view(E, -1, gradient.shape[-1])  # [r * E, in], expert-major
        elif name.endswith("_B"):
            gradient = gradient.view(len(gradient), -1, E).permute(2, 0, 1)  # [out, r * E], rank-major
        found[name] = gradient[experts.to(layer.device)]
        zeros.append(gradient[empty.to(layer.device)].flatten())
    if zeros and len(empty):
        found["d_empty"] = torch.stack([part.abs().max() for part in zeros]).float().amax().cpu()[None]
    return found


def _compute(
    op: str, layer: Layer, draw: Draw, rows: Tensor, experts: Tensor, dtype: torch.dtype, expert: Expert
) -> Gradients:
    wide = torch.promote_types(dtype, torch.float32)
    rows = rows.to(layer.device)
    x, g, index = draw.normed[rows].to(dtype), draw.hidden[rows].to(dtype), draw.index[rows]
    weights = draw.weights[rows].to(wide)
    out, d_hidden, d_weights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    for number in index.unique().tolist():
        token, pick = torch.where(index == number)
        parts = _parts(op, layer, number, dtype, trained=False)
        y, grads = _one(op, expert, x[token], weights[token, pick, None], parts, g[token])
        out.index_add_(0, token, y)
        d_hidden.index_add_(0, token, grads[0])
        d_weights[token, pick] = grads[1][:, 0]
    result = {"out": out, "d_hidden": d_hidden, "d_weights": d_weights}
    stacks: dict[str, list[Tensor]] = {}
    for number in experts.tolist() if op != "experts_frozen" else []:
        token, pick = torch.where(draw.index == number)
        parts = _parts(op, layer, number, dtype, trained=True)
        given = draw.normed[token].to(dtype), draw.weights[token, pick, None].to(wide), parts
        grads = _one(op, expert, *given, draw.hidden[token].to(dtype))[1]
        for name, grad in zip((name for name in parts if parts[name].requires_grad), grads[2:], strict=True):
            stacks.setdefault(f"d_{name}", []).append(grad)
    return result | {name: torch.stack(grads) for name, grads in stacks.items()}


def _parts(op: str, layer: Layer, number: int, dtype: torch.dtype, *, trained: bool) -> dict[str, Tensor]:
    """One expert's matrices, and in a LoRA operation its factors; those that are trained want gradients."""
    parts = {"gate_up": layer.gate_up[number].to(dtype), "down": layer.down[number].to(dtype)}
    if op not in RANKS:
        return {name: part.detach().requires_grad_(trained) for name, part in parts.items()}
    E = layer.shape.E
    for name, parameter in adapted(layer, RANKS[op]).parameters.items():
        factor = parameter.detach()
        one = factor.view(E, -1, factor.shape[1])[number] if name.endswith("_A") else factor[:, number::E]
        parts[name] = one.to(dtype).requires_grad_(trained)
    return parts


def _one(
    op: str, expert: Expert, x: Tensor, weights: Tensor, parts: dict[str, Tensor], g: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One expert's output for its tokens, and the gradients of x, weights and of the parts that want one."""
    with torch.enable_grad():
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        matrices = [parts["gate_up"], parts["down"]]
        if op in RANKS:  # the merged weight, as PEFT makes it
            for place, name in enumerate(("gate_up", "down")):
                update = (parts[f"{name}_B"][None], parts[f"{name}_A"][None])
                matrices[place] = torch.baddbmm(matrices[place][None], *update, alpha=SCALING)[0]
        y = expert(x, matrices[0], matrices[1], weights)
        wanted = [x, weights, *(part for part in parts.values() if part.requires_grad)]
        return y.detach(), torch.autograd.grad(y, wanted, g)


def _first(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
