"""The mathematics of Gemma-4's mixture-of-experts block in readable PyTorch: the oracle of every test.

Shapes: T tokens, K experts per token (top-k), E experts, H hidden size, I intermediate size of an expert. Every
function takes any floating dtype; in float64 it is the truth that the kernels are measured against. Only torch is
imported here, and no backend imports this file.

The formulas are those of `Gemma4TextRouter` and `Gemma4TextExperts` in transformers 5.23. The forward functions are
differentiable, and in float64 torch's own gradients of them are the truth; the `_bwd` functions spell out the formulas
that the kernels follow.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # Gemma-4's `gelu_pytorch_tanh`
    "gelu": F.gelu,  # with erf
    "silu": F.silu,
}
NUMERICS = ("hf", "fp32")

LoraFactors = tuple[Tensor, Tensor]  # lhs [E, out, r], rhs [E, r, in]: the weight is W + lhs @ rhs


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


_SLOPES = {"gelu_tanh": _gelu_tanh_slope, "gelu": _gelu_slope, "silu": _silu_slope}


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


def statistics(probabilities: Tensor, index: Tensor) -> Tensor:
    """How sure a router is: [T, 3] in the dtype of `probabilities`.

    The entropy of the whole softmax in nats, the sum of the chosen probabilities, and the margin p_K - p_(K+1) between
    the last that is chosen and the first that is not (p_K where all are chosen).

    Args:
        probabilities: [T, E], as `topk_gate` returns them.
        index: [T, K], as `topk_gate` returns it.
    """
    chosen = probabilities.gather(-1, index)
    rest = probabilities.scatter(-1, index, 0.0)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1)
    return torch.stack([entropy, chosen.sum(-1), chosen.amin(-1) - rest.amax(-1)], dim=-1)


def as_probabilities(values: Tensor) -> Tensor:
    """`values` [T, E] themselves where a row is a distribution, its softmax where it holds logits.

    The first output of a router is called logits in transformers, and holds probabilities in Gemma-4's: a softmax of
    these would look almost uniform. Reads nothing back to the host.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    total = values.sum(-1, keepdim=True)
    distribution = (values.amin(-1, keepdim=True) >= 0) & ((total - 1).abs() < 0.05)
    return torch.where(distribution, values, torch.softmax(values, dim=-1))


def record(
    probabilities: Tensor,
    weights: Tensor,
    index: Tensor,
    ids: Tensor,
    half_weights: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Write a router's decision for T tokens into the first T rows of a trace's buffers (`backends.TraceBuffers`).

    A token whose probabilities are not finite was not routed: its experts are what a sort makes of NaN, and -2 is
    written in their place.
    """
    T = index.shape[0]
    routed = probabilities.isfinite().all(-1, keepdim=True)
    ids[:T] = torch.where(routed, index, -2).to(ids.dtype)
    if half_weights is not None:
        half_weights[:T] = weights
    if stats is not None:
        stats[:T] = statistics(probabilities, index)


def topk_gate_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    index: Tensor,
    per_expert_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `topk_gate` with respect to its logits [T, E] and per_expert_scale [E], in the dtype of
    `probabilities`.

    With q = p / sum of p over the chosen, weight = q * c (c the per-expert scale) and d = c * grad_weights:

        d logit of a chosen expert = q * (d - sum of q d), of any other 0;   d c = sum over tokens of q * grad_weights

    A gradient of the probabilities adds the softmax's own, p * (grad - sum of p grad).

    Args:
        grad_probabilities: [T, E], or None for zeros.
        grad_weights: [T, K], or None for zeros.
        probabilities: [T, E], as `topk_gate` returned them.
        index: [T, K], as `topk_gate` returned it.
        per_expert_scale: [E].
    """
    d_logits = torch.zeros_like(probabilities)
    d_scale = torch.zeros_like(probabilities)
    if grad_weights is not None:
        chosen = probabilities.gather(-1, index)
        q = chosen / chosen.sum(-1, keepdim=True)
        d = grad_weights * per_expert_scale.to(q.dtype)[index]
        d_logits.scatter_(-1, index, q * (d - (q * d).sum(-1, keepdim=True)))
        d_scale.scatter_(-1, index, q * grad_weights)
    if grad_probabilities is not None:
        inner = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        d_logits += probabilities * (grad_probabilities - inner)
    return d_logits, d_scale.sum(0)


def route_bwd(
    d_logits: Tensor, hidden: Tensor, proj_weight: Tensor, scale: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `route` with respect to hidden [T, H], proj_weight [E, H] and scale [H], from those of its logits.

    With n = x * r, r = (mean x^2 + eps)^-1/2, s = n * scale * H^-1/2 and logits = W s:

        d W = sum over tokens of d_logits s^T,   d s = W^T d_logits,   d scale = sum over tokens of H^-1/2 n * d s
        d n = H^-1/2 scale * d s,   d x = r * (d n - n * mean(n * d n))

    The roundings of numerics "hf" count as the identity, as in torch's own gradient of a cast.

    Args:
        d_logits: [T, E], from `topk_gate_bwd`.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x, root = hidden.to(wide), hidden.shape[-1] ** -0.5
    reciprocal = torch.pow(x.pow(2).mean(-1, keepdim=True) + eps, -0.5)  # [T, 1]
    normed = x * reciprocal
    d_scaled = d_logits.to(wide) @ proj_weight.to(wide)  # [T, H]
    d_proj = d_logits.to(wide).T @ (normed * scale.to(wide) * root)
    d_scale = (d_scaled * normed).sum(0) * root
    d_normed = d_scaled * scale.to(wide) * root
    d_hidden = reciprocal * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_hidden.to(hidden.dtype), d_proj.to(proj_weight.dtype), d_scale.to(scale.dtype)


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gate_up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Sum over a token's experts of `weight * down(act(gate(x)) * up(x))`.

    Args:
        hidden: [T, H].
        gate_up_proj: [E, 2I, H], gate rows first, then up rows.
        down_proj: [E, H, I].
        index: [T, K] integer expert ids; an id >= E (a sentinel of expert parallelism) contributes nothing.
        weights: [T, K].
        activation: "gelu_tanh", "gelu" or "silu".
        gate_up_lora: low-rank update (lhs [E, 2I, r], rhs [E, r, H]) of gate_up_proj: W + lhs @ rhs.
        down_lora: low-rank update (lhs [E, H, r], rhs [E, r, I]) of down_proj.
        gate_up_scale: [E, 2I], where gate_up_proj is stored in 8 bits: the weight is float(stored) * scale of its row,
            rounded to the dtype of `hidden`.
        down_scale: [E, H], likewise.

    Returns:
        [T, H] in `hidden.dtype`; the sum over a token's experts is taken in float32 or wider, in the order of `index`.
    """
    act = ACTIVATIONS[activation]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    per_pick = hidden.new_zeros((*index.shape, hidden.shape[1]), dtype=wide)  # [T, K, H]
    # unbind, because the gradient of each `gate_up_proj[e]` would be a tensor of zeros for all experts.
    gate_ups = _matrices(gate_up_proj, gate_up_scale, hidden.dtype)
    downs = _matrices(down_proj, down_scale, hidden.dtype)
    for expert, token, pick in _picks(index, down_proj.shape[0]):
        x = hidden[token]
        pre = F.linear(x, gate_ups(expert))
        if gate_up_lora is not None:
            pre = pre + F.linear(F.linear(x, gate_up_lora[1][expert]), gate_up_lora[0][expert])
        gate, up = pre.chunk(2, dim=-1)
        h = act(gate) * up
        y = F.linear(h, downs(expert))
        if down_lora is not None:
            y = y + F.linear(F.linear(h, down_lora[1][expert]), down_lora[0][expert])
        per_pick[token, pick] = y.to(wide) * weights[token, pick, None].to(wide)
    return per_pick.sum(1).to(hidden.dtype)


def expert_mlp_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gate_up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    needed: Sequence[bool] = (True,) * 8,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `expert_mlp`, from `grad_out` [T, H] and the forward's arguments; what the kernels compute.

    With x a token's hidden state, p = W_gu x its pre-activation (gate, up), h = act(gate) * up and g = grad_out:

        a = W_down^T g                      d weight = <a, h>
        d gate = weight * a * up * act'(gate),  d up = weight * a * act(gate)
        d x = sum over k of W_gu^T (d gate, d up)
        d W_gu = sum over tokens of (d gate, d up) x^T,   d W_down = sum over tokens of g (weight * h)^T

    where W stands for W + lhs rhs if there is a low-rank update, whose factors get d lhs = dW rhs^T, d rhs = lhs^T dW,
    evaluated without dW.

    Args:
        needed: which gradients to compute, in the order of the result; not those of projections stored in 8 bits.
        gate_up_scale, down_scale: as in `expert_mlp`.

    Returns:
        gradients of hidden, gate_up_proj, down_proj, weights, gate_up_lora (lhs, rhs), down_lora (lhs, rhs), each in
        the dtype of its tensor, None where not needed or absent. Sums over tokens and experts are float32 or wider.
    """
    act, slope = ACTIVATIONS[activation], _SLOPES[activation]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    inputs = (hidden, gate_up_proj, down_proj, weights, *(gate_up_lora or (None, None)), *(down_lora or (None, None)))
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip(inputs, needed, strict=True)
    ]
    d_hidden, d_gate_up, d_down, d_weights, d_gate_up_lhs, d_gate_up_rhs, d_down_lhs, d_down_rhs = grads
    per_pick = hidden.new_zeros((*index.shape, hidden.shape[1]), dtype=wide) if d_hidden is not None else None
    gate_ups = _matrices(gate_up_proj, gate_up_scale, hidden.dtype)
    downs = _matrices(down_proj, down_scale, hidden.dtype)
    for expert, token, pick in _picks(index, down_proj.shape[0]):
        gate_up, down = gate_ups(expert), downs(expert)
        x, g, weight = hidden[token], grad_out[token], weights[token, pick, None].to(wide)
        pre = F.linear(x, gate_up)
        a = g @ down
        if gate_up_lora is not None:
            lhs_up, rhs_up = (factor[expert] for factor in gate_up_lora)
            x_rhs = F.linear(x, rhs_up)  # [n, r]
            pre = pre + F.linear(x_rhs, lhs_up)
        if down_lora is not None:
            lhs_down, rhs_down = (factor[expert] for factor in down_lora)
            g_lhs = g @ lhs_down
            a = a + g_lhs @ rhs_down
        gate, up = pre.to(wide).chunk(2, dim=-1)
        a = a.to(wide)
        h = act(gate) * up
        d_pre = torch.cat([a * weight * up * slope(gate), a * weight * act(gate)], dim=-1).to(hidden.dtype)
        weighted = (h * weight).to(hidden.dtype)
        if d_weights is not None:
            d_weights[token, pick] = (a * h).sum(-1).to(weights.dtype)
        if per_pick is not None:
            d_x = d_pre @ gate_up
            if gate_up_lora is not None:
                d_x = d_x + (d_pre @ lhs_up) @ rhs_up
            per_pick[token, pick] = d_x.to(wide)
        if d_gate_up is not None:
            d_gate_up[expert] = d_pre.T @ x
        if d_down is not None:
            d_down[expert] = g.T @ weighted
        if d_gate_up_lhs is not None:
            d_gate_up_lhs[expert] = d_pre.T @ x_rhs
        if d_gate_up_rhs is not None:
            d_gate_up_rhs[expert] = (d_pre @ lhs_up).T @ x
        if d_down_lhs is not None:
            d_down_lhs[expert] = g.T @ F.linear(weighted, rhs_down)
        if d_down_rhs is not None:
            d_down_rhs[expert] = g_lhs.T @ weighted
    if per_pick is not None:
        grads[0] = per_pick.sum(1).to(hidden.dtype)
    return tuple(grads)


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float(stored) * scale of its row, rounded once to `dtype`: stored [..., rows, columns], scale [..., rows]."""
    wide = torch.promote_types(dtype, torch.float32)
    return (stored.to(wide) * scale.to(wide)[..., None]).to(dtype)


def _matrices(projection: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """The matrix of an expert, made from its 8-bit form where it is asked for."""
    matrices = projection.unbind()
    if scale is None:
        return lambda expert: matrices[expert]
    return lambda expert: dequantise(matrices[expert], scale[expert], dtype)


def _picks(index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that `index` [T, K] names: its id, and the tokens and picks that chose it."""
    for expert in index.unique().tolist():
        if expert < num_experts:
            yield expert, *torch.where(index == expert)
