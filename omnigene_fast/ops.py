"""The operators, for anybody's own model: `route`, `topk_gate`, `expert_mlp`.

Each public function validates its arguments, then calls one opaque operator registered with torch.library
(`torch.ops.omnigene_fast.<op>_fwd`), so that `torch.compile(fullgraph=True)` sees one node whose output sizes do not
depend on data. Dimensions: T tokens, K experts per token, E experts, H hidden, I intermediate.
"""

import torch
from torch import Tensor

from . import reference
from .backends import NAMES as BACKENDS
from .backends import select

__all__ = ["expert_mlp", "route", "topk_gate"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LIB = torch.library.Library("omnigene_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIB.define(
    "route_fwd(Tensor hidden, Tensor proj_weight, Tensor scale, Tensor per_expert_scale, int top_k, float eps,"
    " str numerics, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "topk_gate_fwd(Tensor logits, Tensor per_expert_scale, int top_k, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "expert_mlp_fwd(Tensor hidden, Tensor gate_up_proj, Tensor down_proj, Tensor index, Tensor weights,"
    " str activation, bool expert_parallel, str backend) -> Tensor",
    tags=_TAGS,
)


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

    Returns:
        probabilities [T, E] float32, weights [T, K] float32, index [T, K] int64 (float64 inputs: float64). Equal
        probabilities go to the lowest expert id.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
        RuntimeError: the requested backend is not available.

    The formula is `reference.route`, that of `Gemma4TextRouter.forward` in transformers.
    """
    _check_tensor("hidden", hidden, "[T, H]", 2)
    H = hidden.shape[1]
    _check_tensor("proj_weight", proj_weight, "[E, H]", 2, like=hidden)
    E = proj_weight.shape[0]
    _check_size("proj_weight", proj_weight, 1, H, "hidden.shape[1]")
    _check_vector("scale", scale, H, "hidden.shape[1]", hidden)
    _check_vector("per_expert_scale", per_expert_scale, E, "proj_weight.shape[0]", hidden)
    _check_top_k(top_k, E)
    if not isinstance(eps, float) or not eps >= 0:
        raise ValueError(f"eps: expected a float >= 0, got {eps!r}.")
    if numerics not in reference.NUMERICS:
        raise ValueError(f"numerics: expected 'hf' or 'fp32', got {numerics!r}.")
    _check_backend(backend)
    return torch.ops.omnigene_fast.route_fwd(
        hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend
    )


def topk_gate(
    logits: Tensor, per_expert_scale: Tensor, *, top_k: int, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows a router's projection: softmax, top-k, renormalise, per-expert scale.

    For a router whose `proj` is a wrapped module (LoRA, 4-bit): call the module, then this.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64.
        per_expert_scale: [E], any of those dtypes.
        top_k: K, 1 <= K <= E.
        backend: as for `route`.

    Returns:
        probabilities [T, E] float32, weights [T, K] float32, index [T, K] int64 (float64 logits: float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `route`.

    The formula is `reference.topk_gate`.
    """
    _check_tensor("logits", logits, "[T, E]", 2)
    _check_vector("per_expert_scale", per_expert_scale, logits.shape[1], "logits.shape[1]", logits, same_dtype=False)
    _check_top_k(top_k, logits.shape[1])
    _check_backend(backend)
    return torch.ops.omnigene_fast.topk_gate_fwd(logits, per_expert_scale, top_k, backend)


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    activation: str,
    expert_parallel: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Gated experts: the sum over a token's experts of `weight * down(act(gate(x)) * up(x))`.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64.
        gate_up_proj: [E, 2I, H], gate rows first, then up rows, dtype of `hidden`; the last dimension contiguous.
        down_proj: [E, H, I], dtype of `hidden`; the last dimension contiguous.
        index: [T, K] int64 or int32 expert ids in [0, E).
        weights: [T, K], any floating dtype; applied in float32.
        activation: "gelu_tanh" (Gemma-4), "gelu" (erf) or "silu".
        expert_parallel: ids >= E are sentinels of other ranks and contribute nothing.
        backend: as for `route`.

    Returns:
        [T, H] in the dtype of `hidden`. A token's experts are summed in float32 in the order of `index`, then rounded.

    Raises:
        TypeError, ValueError, RuntimeError: as `route`.
        IndexError: an id out of range, on the CPU; on a GPU, where looking would stop the stream, such a row
            contributes nothing unless OMNIGENE_FAST_CHECK_IDS=1 asks for the check.

    The formula is `reference.expert_mlp`, that of `Gemma4TextExperts.forward` in transformers.
    """
    _check_tensor("hidden", hidden, "[T, H]", 2)
    T, H = hidden.shape
    _check_tensor("gate_up_proj", gate_up_proj, "[E, 2I, H]", 3, like=hidden)
    _check_tensor("down_proj", down_proj, "[E, H, I]", 3, like=hidden)
    E = gate_up_proj.shape[0]
    if E == 0 or gate_up_proj.shape[1] % 2:
        raise ValueError(
            "gate_up_proj: expected [E, 2I, H] with E >= 1 and an even second dimension,"
            f" got shape {_shape(gate_up_proj)}."
        )
    _check_size("gate_up_proj", gate_up_proj, 2, H, "hidden.shape[1]")
    expected = (E, H, gate_up_proj.shape[1] // 2)
    if tuple(down_proj.shape) != expected:
        raise ValueError(
            f"down_proj: expected [E, H, I] = {list(expected)} to match gate_up_proj, got shape {_shape(down_proj)}."
        )
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.shape[2] > 1 and weight.stride(2) != 1:
            raise ValueError(
                f"{name}: expected the last dimension contiguous, got strides {list(weight.stride())};"
                f" store it with {name}.contiguous() once."
            )
    _check_tensor("index", index, "[T, K]", 2, device=hidden.device, dtypes=(torch.int64, torch.int32))
    _check_tensor("weights", weights, "[T, K]", 2, device=hidden.device)
    if index.shape[0] != T or index.shape[1] < 1:
        raise ValueError(f"index: expected [T, K] with T = {T} and K >= 1, got shape {_shape(index)}.")
    if weights.shape != index.shape:
        raise ValueError(f"weights: expected the shape of index {_shape(index)}, got shape {_shape(weights)}.")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}.")
    _check_backend(backend)
    return torch.ops.omnigene_fast.expert_mlp_fwd(
        hidden, gate_up_proj, down_proj, index, weights, activation, expert_parallel, backend
    )


def _route_fwd(hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend):  # type: ignore[no-untyped-def]
    chosen = select(backend, hidden.device, hidden.dtype)
    if chosen is None:
        with torch.autocast(hidden.device.type, enabled=False):  # the arguments' dtypes decide, as in every backend
            return reference.route(
                hidden, proj_weight, scale, per_expert_scale, top_k=top_k, eps=eps, numerics=numerics
            )
    return chosen.route(hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics)


def _topk_gate_fwd(logits, per_expert_scale, top_k, backend):  # type: ignore[no-untyped-def]
    chosen = select(backend, logits.device, logits.dtype)
    if chosen is None:
        return reference.topk_gate(logits, per_expert_scale, top_k=top_k)
    return chosen.topk_gate(logits, per_expert_scale, top_k)


def _expert_mlp_fwd(  # type: ignore[no-untyped-def]
    hidden, gate_up_proj, down_proj, index, weights, activation, expert_parallel, backend
):
    chosen = select(backend, hidden.device, hidden.dtype)
    if chosen is None:
        check_ids(index, gate_up_proj.shape[0], expert_parallel)
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.expert_mlp(hidden, gate_up_proj, down_proj, index, weights, activation=activation)
    return chosen.expert_mlp(hidden, gate_up_proj, down_proj, index, weights, activation, expert_parallel)


def _gate_fake(rows: Tensor, E: int | torch.SymInt, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    T = rows.shape[0]
    return (
        rows.new_empty((T, E), dtype=wide),
        rows.new_empty((T, top_k), dtype=wide),
        rows.new_empty((T, top_k), dtype=torch.int64),
    )


_LIB.impl("route_fwd", _route_fwd, "CompositeExplicitAutograd")
_LIB.impl("topk_gate_fwd", _topk_gate_fwd, "CompositeExplicitAutograd")
_LIB.impl("expert_mlp_fwd", _expert_mlp_fwd, "CompositeExplicitAutograd")


@torch.library.register_fake("omnigene_fast::route_fwd", lib=_LIB)
def _route_fake(hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend):  # type: ignore[no-untyped-def]
    return _gate_fake(hidden, proj_weight.shape[0], top_k)


@torch.library.register_fake("omnigene_fast::topk_gate_fwd", lib=_LIB)
def _topk_gate_fake(logits, per_expert_scale, top_k, backend):  # type: ignore[no-untyped-def]
    return _gate_fake(logits, logits.shape[1], top_k)


@torch.library.register_fake("omnigene_fast::expert_mlp_fwd", lib=_LIB)
def _expert_mlp_fake(  # type: ignore[no-untyped-def]
    hidden, gate_up_proj, down_proj, index, weights, activation, expert_parallel, backend
):
    return hidden.new_empty(hidden.shape)


def check_ids(index: Tensor, num_experts: int, expert_parallel: bool) -> None:
    """Raise IndexError if an id is negative, or >= `num_experts` without expert parallelism. Reads the data."""
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or (high >= num_experts and not expert_parallel):
        raise IndexError(
            f"index: expected expert ids in [0, {num_experts}), got {low if low < 0 else high};"
            " pass expert_parallel=True if ids >= E are sentinels of other ranks."
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_tensor(
    name: str,
    tensor: Tensor,
    layout: str,
    rank: int,
    *,
    like: Tensor | None = None,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}.")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {layout}, got shape {_shape(tensor)}.")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}.")
    if like is not None:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected the dtype of the first argument, {like.dtype}, got {tensor.dtype}.")
        device = like.device
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument, got {tensor.device}.")


def _check_size(name: str, tensor: Tensor, dim: int, expected: int, source: str) -> None:
    if tensor.shape[dim] != expected:
        raise ValueError(f"{name}: expected shape[{dim}] = {expected} ({source}), got shape {_shape(tensor)}.")


def _check_vector(name: str, tensor: Tensor, size: int, source: str, first: Tensor, *, same_dtype: bool = True) -> None:
    _check_tensor(name, tensor, f"[{size}]", 1, like=first if same_dtype else None, device=first.device)
    _check_size(name, tensor, 0, size, source)


def _check_top_k(top_k: int, E: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected an integer in [1, {E}], got {top_k!r}.")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
