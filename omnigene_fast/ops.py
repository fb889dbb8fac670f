"""The operators, for anybody's own model: `route`, `topk_gate`, `expert_mlp`. All are differentiable.

Each public function validates its arguments, then calls one opaque operator registered with torch.library
(`torch.ops.omnigene_fast.<op>_fwd`, see `_library.py`), so that `torch.compile(fullgraph=True)` sees one node whose
output sizes do not depend on data; its gradient is another (`<op>_bwd`, see `autograd.py`). Dimensions: T tokens,
K experts per token, E experts, H hidden, I intermediate, r rank of a low-rank update.
"""

import torch
from torch import Tensor

from . import _library, reference  # noqa: F401  (_library registers the operators)
from ._validate import (
    DTYPES,
    LOW_BIT,
    check_backend,
    check_ids,
    check_size,
    check_tensor,
    check_top_k,
    check_trace,
    check_vector,
    shape_of,
)
from .backends import TraceBuffers

__all__ = ["DTYPES", "SAVE", "TraceBuffers", "check_ids", "expert_mlp", "route", "topk_gate"]

SAVE = ("preactivation", "input")


def route(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    *,
    top_k: int,
    eps: float,
    numerics: str = "hf",
    backend: str = "auto",
    trace: TraceBuffers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gemma-4's whole router in one operator: norm, scale, projection, softmax, top-k, renormalise, per-expert scale.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; the residual stream.
        proj_weight: [E, H], dtype of `hidden`.
        scale: [H], dtype of `hidden`.
        per_expert_scale: [E], dtype of `hidden`.
        top_k: K, 1 <= K <= E.
        eps: added to the mean square, as `rms_norm_eps`.
        numerics: "hf" rounds where transformers rounds and so routes as the stock model does; "fp32" keeps float32.
        backend: "auto", "cpu", "triton" or "reference"; an explicit one never falls back.
        trace: buffers of at least T rows that the decision is written into as well, where it is made: ids [T_max, K]
            uint8 (E <= 254) or int16 with the bits of uint16, weights [T_max, K] float16 or None, stats [T_max, 3]
            float16 or None: entropy of the softmax in nats, sum of the chosen probabilities, p_K - p_(K+1). All ids of
            a token whose probabilities are NaN are written as -2: 254, or 65534.

    Returns:
        probabilities [T, E] float32, weights [T, K] float32, index [T, K] int64 (float64 inputs: float64). Equal
        probabilities go to the lowest expert id.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
        RuntimeError: the requested backend is not available.

    The formula is `reference.route`, that of `Gemma4TextRouter.forward` in transformers.
    """
    check_tensor("hidden", hidden, "[T, H]", 2)
    H = hidden.shape[1]
    check_tensor("proj_weight", proj_weight, "[E, H]", 2, like=hidden)
    E = proj_weight.shape[0]
    check_size("proj_weight", proj_weight, 1, H, "hidden.shape[1]")
    check_vector("scale", scale, H, "hidden.shape[1]", hidden)
    check_vector("per_expert_scale", per_expert_scale, E, "proj_weight.shape[0]", hidden)
    check_top_k(top_k, E)
    if not isinstance(eps, float) or not eps >= 0:
        raise ValueError(f"eps: expected a float >= 0, got {eps!r}.")
    if numerics not in reference.NUMERICS:
        raise ValueError(f"numerics: expected 'hf' or 'fp32', got {numerics!r}.")
    check_backend(backend)
    arguments = hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend
    if trace is None:
        return torch.ops.omnigene_fast.route_fwd(*arguments)
    check_trace(trace, hidden, top_k, E)
    return torch.ops.omnigene_fast.route_traced_fwd(*arguments, *trace)


def topk_gate(
    logits: Tensor,
    per_expert_scale: Tensor,
    *,
    top_k: int,
    backend: str = "auto",
    trace: TraceBuffers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows a router's projection: softmax, top-k, renormalise, per-expert scale.

    For a router whose `proj` is a wrapped module (LoRA, 4-bit): call the module, then this.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64.
        per_expert_scale: [E], any of those dtypes.
        top_k: K, 1 <= K <= E.
        backend, trace: as for `route`.

    Returns:
        probabilities [T, E] float32, weights [T, K] float32, index [T, K] int64 (float64 logits: float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `route`.

    The formula is `reference.topk_gate`.
    """
    check_tensor("logits", logits, "[T, E]", 2)
    check_vector("per_expert_scale", per_expert_scale, logits.shape[1], "logits.shape[1]", logits, same_dtype=False)
    check_top_k(top_k, logits.shape[1])
    check_backend(backend)
    if trace is None:
        return torch.ops.omnigene_fast.topk_gate_fwd(logits, per_expert_scale, top_k, backend)
    check_trace(trace, logits, top_k, logits.shape[1])
    return torch.ops.omnigene_fast.topk_gate_traced_fwd(logits, per_expert_scale, top_k, backend, *trace)


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gate_up_lora: tuple[Tensor, Tensor] | None = None,
    down_lora: tuple[Tensor, Tensor] | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    expert_parallel: bool = False,
    save: str = "preactivation",
    backend: str = "auto",
) -> Tensor:
    """Gated experts: the sum over a token's experts of `weight * down(act(gate(x)) * up(x))`.

    Differentiable in hidden, the two projections, weights and the low-rank factors; only what requires a gradient is
    computed, and with frozen projections nothing of their size is allocated.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64.
        gate_up_proj: [E, 2I, H], gate rows first, then up rows, dtype of `hidden`; the last dimension contiguous. With
            `gate_up_scale` int8 or float8_e4m3fn.
        down_proj: [E, H, I], dtype of `hidden`; the last dimension contiguous. With `down_scale` as `gate_up_proj`.
        index: [T, K] int64 or int32 expert ids in [0, E).
        weights: [T, K], any floating dtype; applied in float32.
        activation: "gelu_tanh" (Gemma-4), "gelu" (erf) or "silu".
        gate_up_lora: low-rank update (lhs [E, 2I, r], rhs [E, r, H]) in the dtype of `hidden`: the experts compute with
            gate_up_proj + lhs @ rhs, a sum that is never built. A scaling belongs into lhs.
        down_lora: low-rank update (lhs [E, H, r], rhs [E, r, I]) of down_proj; its r may be another.
        gate_up_scale: [E, 2I] float32, for a frozen projection stored in 8 bits: the weight is float(stored) * scale of
            its row. Both projections have a scale, or neither.
        down_scale: [E, H] float32, likewise.
        expert_parallel: ids >= E are sentinels of other ranks and contribute nothing.
        save: what a backward keeps besides `hidden` and the routing: "preactivation" keeps the output of gate_up_proj,
            T * K * 2I elements; "input" nothing, and computes it again.
        backend: as for `route`.

    Returns:
        [T, H] in the dtype of `hidden`. A token's experts are summed in float32 in the order of `index`, then rounded.

    Raises:
        TypeError, ValueError, RuntimeError: as `route`.
        IndexError: an id out of range, on the CPU; on a GPU, where looking would stop the stream, such a row
            contributes nothing unless OMNIGENE_FAST_CHECK_IDS=1 asks for the check.

    The formula is `reference.expert_mlp`, that of `Gemma4TextExperts.forward` in transformers.
    """
    check_tensor("hidden", hidden, "[T, H]", 2)
    T, H = hidden.shape
    if gate_up_scale is None and down_scale is None:
        check_tensor("gate_up_proj", gate_up_proj, "[E, 2I, H]", 3, like=hidden)
        check_tensor("down_proj", down_proj, "[E, H, I]", 3, like=hidden)
    else:
        check_tensor("gate_up_proj", gate_up_proj, "[E, 2I, H]", 3, device=hidden.device, dtypes=LOW_BIT)
        check_tensor("down_proj", down_proj, "[E, H, I]", 3, device=hidden.device, dtypes=(gate_up_proj.dtype,))
    E = gate_up_proj.shape[0]
    if E == 0 or gate_up_proj.shape[1] % 2:
        raise ValueError(
            "gate_up_proj: expected [E, 2I, H] with E >= 1 and an even second dimension,"
            f" got shape {shape_of(gate_up_proj)}."
        )
    check_size("gate_up_proj", gate_up_proj, 2, H, "hidden.shape[1]")
    expected = (E, H, gate_up_proj.shape[1] // 2)
    if tuple(down_proj.shape) != expected:
        raise ValueError(
            f"down_proj: expected [E, H, I] = {list(expected)} to match gate_up_proj, got shape {shape_of(down_proj)}."
        )
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.shape[2] > 1 and weight.stride(2) != 1:
            raise ValueError(
                f"{name}: expected the last dimension contiguous, got strides {list(weight.stride())};"
                f" store it with {name}.contiguous() once."
            )
    check_tensor("index", index, "[T, K]", 2, device=hidden.device, dtypes=(torch.int64, torch.int32))
    check_tensor("weights", weights, "[T, K]", 2, device=hidden.device)
    if index.shape[0] != T or index.shape[1] < 1:
        raise ValueError(f"index: expected [T, K] with T = {T} and K >= 1, got shape {shape_of(index)}.")
    if weights.shape != index.shape:
        raise ValueError(f"weights: expected the shape of index {shape_of(index)}, got shape {shape_of(weights)}.")
    _check_scale("gate_up_scale", gate_up_scale, gate_up_proj, down_scale)
    _check_scale("down_scale", down_scale, down_proj, gate_up_scale)
    _check_lora("gate_up_lora", gate_up_lora, gate_up_proj, hidden)
    _check_lora("down_lora", down_lora, down_proj, hidden)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}.")
    if save not in SAVE:
        raise ValueError(f"save: expected 'preactivation' or 'input', got {save!r}.")
    check_backend(backend)
    factors = (*(gate_up_lora or (None, None)), *(down_lora or (None, None)))
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, gate_up_proj, down_proj, weights, *factors)
    )
    return torch.ops.omnigene_fast.expert_mlp_fwd(
        hidden,
        gate_up_proj,
        down_proj,
        index,
        weights,
        *factors,
        gate_up_scale,
        down_scale,
        activation,
        expert_parallel,
        wants_grad and save == "preactivation",
        backend,
    )[0]


def _check_scale(name: str, scale: Tensor | None, weight: Tensor, other: Tensor | None) -> None:
    if scale is None and other is None:
        return
    if scale is None:
        raise ValueError(f"{name}: expected a scale for each projection or for neither, got None.")
    check_tensor(name, scale, "[E, rows]", 2, device=weight.device, dtypes=(torch.float32,))
    if scale.shape != weight.shape[:2] or scale.requires_grad or weight.requires_grad:
        raise ValueError(
            f"{name}: expected shape {shape_of(weight)[:2]}, one for each row of a frozen projection, got"
            f" {shape_of(scale)}{' that requires a gradient' if scale.shape == weight.shape[:2] else ''}."
        )


def _check_lora(name: str, lora: tuple[Tensor, Tensor] | None, weight: Tensor, hidden: Tensor) -> None:
    if lora is None:
        return
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise TypeError(f"{name}: expected a pair of tensors (lhs, rhs) or None, got {type(lora).__name__}.")
    lhs, rhs = lora
    E, rows, columns = weight.shape
    check_tensor(f"{name}[0]", lhs, "[E, out, r]", 3, like=hidden)
    check_tensor(f"{name}[1]", rhs, "[E, r, in]", 3, like=hidden)
    rank = rhs.shape[1]
    for factor, what, expected in ((lhs, "[0]", (E, rows, rank)), (rhs, "[1]", (E, rank, columns))):
        if tuple(factor.shape) != expected or rank < 1:
            raise ValueError(
                f"{name}{what}: expected shape {list(expected)} with r >= 1 to match the projection, got"
                f" {shape_of(factor)}."
            )
