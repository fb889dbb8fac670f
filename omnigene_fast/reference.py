"""The mathematics of Gemma-4's mixture-of-experts block in readable PyTorch: the oracle of every test.

Shapes: T tokens, K experts per token (top-k), E experts, H hidden size, I intermediate size of an expert. Every
function takes any floating dtype; in float64 it is the truth that the kernels are measured against. Only torch is
imported here, and no backend imports this file.

The formulas are those of `Gemma4TextRouter` and `Gemma4TextExperts` in transformers 5.23.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # Gemma-4's `gelu_pytorch_tanh`
    "gelu": F.gelu,  # with erf
    "silu": F.silu,
}
NUMERICS = ("hf", "fp32")


def route(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    *,
    top_k: int,
    eps: float,
    numerics: str = "hf",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gemma-4's router: RMSNorm without weight, scale, projection, softmax, top-k, renormalise, per-expert scale.

    Args:
        hidden: [T, H], the residual stream before any feed-forward norm.
        proj_weight: [E, H].
        scale: [H].
        per_expert_scale: [E].
        top_k: K, experts per token.
        eps: added to the mean square, as `rms_norm_eps`.
        numerics: "hf" rounds to `hidden.dtype` where transformers does (normed, scaled twice, logits); "fp32" keeps
            float32 (float64 for float64 inputs) from the first operation to the last.

    Returns:
        probabilities [T, E], weights [T, K] and index [T, K] int64, the first two in float32 (float64 for float64).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(wide)
    normed = x * torch.pow(x.pow(2).mean(-1, keepdim=True) + eps, -0.5)  # [T, H]
    root = hidden.shape[-1] ** -0.5
    if numerics == "hf":
        scaled = normed.to(hidden.dtype) * scale * root  # two roundings, in this order
        logits = F.linear(scaled, proj_weight)  # [T, E]
    else:
        logits = F.linear(normed * scale.to(wide) * root, proj_weight.to(wide))
    return topk_gate(logits, per_expert_scale, top_k=top_k)


def topk_gate(logits: Tensor, per_expert_scale: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the router's projection: softmax, top-k, renormalise, per-expert scale.

    Equal probabilities go to the lowest expert id (torch.topk leaves that order open).

    Args:
        logits: [T, E].
        per_expert_scale: [E].
        top_k: K, experts per token.

    Returns:
        probabilities [T, E], weights [T, K] and index [T, K] int64, the first two in float32 (float64 for float64).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits, dim=-1, dtype=wide)
    index = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = probabilities.gather(-1, index)
    weights = weights / weights.sum(-1, keepdim=True)
    return probabilities, weights * per_expert_scale.to(wide)[index], index


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    activation: str,
) -> Tensor:
    """Sum over a token's experts of `weight * down(act(gate(x)) * up(x))`.

    Args:
        hidden: [T, H].
        gate_up_proj: [E, 2I, H], gate rows first, then up rows.
        down_proj: [E, H, I].
        index: [T, K] integer expert ids; an id >= E (a sentinel of expert parallelism) contributes nothing.
        weights: [T, K].
        activation: "gelu_tanh", "gelu" or "silu".

    Returns:
        [T, H] in `hidden.dtype`; the sum over a token's experts is taken in float32 or wider, in the order of `index`.
    """
    act = ACTIVATIONS[activation]
    E, _, H = gate_up_proj.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    per_pick = hidden.new_zeros((*index.shape, H), dtype=wide)  # [T, K, H]
    for expert in index.unique().tolist():
        if expert >= E:
            continue
        token, pick = torch.where(index == expert)
        gate, up = F.linear(hidden[token], gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(act(gate) * up, down_proj[expert])
        per_pick[token, pick] = y.to(wide) * weights[token, pick, None].to(wide)
    return per_pick.sum(1).to(hidden.dtype)
