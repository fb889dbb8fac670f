"""The operators as torch sees them: schemas, kernels that pick a backend, and fakes for tracing.

`<op>_fwd` and `<op>_bwd` are functional, and their output sizes never depend on data; `<op>_traced_fwd` also writes
into the buffers of a trace. What a backward does not need it returns as an empty tensor, because a schema has no
optional result. `autograd.py` ties the two together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._validate import check_ids
from .backends import Lora, Scales, TraceBuffers, select

_LIB = torch.library.Library("omnigene_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_EXPERTS = (
    "Tensor hidden, Tensor gate_up_proj, Tensor down_proj, Tensor index, Tensor weights,"
    " Tensor? gate_up_lhs, Tensor? gate_up_rhs, Tensor? down_lhs, Tensor? down_rhs,"
    " Tensor? gate_up_scale, Tensor? down_scale"
)
_ROUTE = (
    "Tensor hidden, Tensor proj_weight, Tensor scale, Tensor per_expert_scale, int top_k, float eps, str numerics,"
    " str backend"
)
_GATE = "Tensor logits, Tensor per_expert_scale, int top_k, str backend"
_DECISION = "(Tensor probabilities, Tensor weights, Tensor index)"
# The traced forms are operators of their own, so that without a trace nothing is mutated and nothing is copied under
# functionalization.
_TRACE = "Tensor(a!) trace_ids, Tensor(b!)? trace_weights, Tensor(c!)? trace_stats"
_SCHEMAS = (
    f"route_fwd({_ROUTE}) -> {_DECISION}",
    f"route_traced_fwd({_ROUTE}, {_TRACE}) -> {_DECISION}",
    "route_bwd(Tensor? grad_probabilities, Tensor? grad_weights, Tensor hidden, Tensor proj_weight, Tensor scale,"
    " Tensor per_expert_scale, Tensor probabilities, Tensor index, float eps, bool[4] needed, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"topk_gate_fwd({_GATE}) -> {_DECISION}",
    f"topk_gate_traced_fwd({_GATE}, {_TRACE}) -> {_DECISION}",
    "topk_gate_bwd(Tensor? grad_probabilities, Tensor? grad_weights, Tensor probabilities, Tensor index,"
    " Tensor per_expert_scale, ScalarType dtype, bool[2] needed, str backend) -> (Tensor, Tensor)",
    f"expert_mlp_fwd({_EXPERTS}, str activation, bool expert_parallel, bool save_preactivation, str backend)"
    " -> (Tensor out, Tensor preactivation)",
    f"expert_mlp_bwd(Tensor grad_out, {_EXPERTS}, Tensor preactivation, str activation, bool expert_parallel,"
    " bool[8] needed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    _LIB.define(_schema, tags=_TAGS)


def _route_fwd(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    top_k: int,
    eps: float,
    numerics: str,
    backend: str,
    *trace: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = select(backend, hidden.device, hidden.dtype)
    buffers = _buffers(trace)
    if chosen is not None:
        return chosen.route(hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, buffers)
    with torch.autocast(hidden.device.type, enabled=False):  # the arguments' dtypes decide, as in every backend
        made = reference.route(hidden, proj_weight, scale, per_expert_scale, top_k=top_k, eps=eps, numerics=numerics)
    if buffers is not None:
        reference.record(*made, *buffers)
    return made


def _route_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    probabilities: Tensor,
    index: Tensor,
    eps: float,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = select(backend, hidden.device, hidden.dtype)
    d_expert_scale: Tensor | None
    grads: tuple[Tensor | None, ...]
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen is not None:
            d_logits, d_expert_scale = chosen.topk_gate_bwd(
                grad_probabilities, grad_weights, probabilities, index, per_expert_scale, needed[3]
            )
            grads = chosen.route_bwd(d_logits, hidden, proj_weight, scale, eps, needed[:3])
        else:
            d_logits, d_expert_scale = reference.topk_gate_bwd(
                grad_probabilities, grad_weights, probabilities, index, per_expert_scale
            )
            grads = reference.route_bwd(d_logits, hidden, proj_weight, scale, eps=eps)
    inputs = (hidden, proj_weight, scale, per_expert_scale)
    return _returned((*grads, d_expert_scale), inputs, needed)


def _topk_gate_fwd(
    logits: Tensor, per_expert_scale: Tensor, top_k: int, backend: str, *trace: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = select(backend, logits.device, logits.dtype)
    buffers = _buffers(trace)
    if chosen is not None:
        return chosen.topk_gate(logits, per_expert_scale, top_k, buffers)
    made = reference.topk_gate(logits, per_expert_scale, top_k=top_k)
    if buffers is not None:
        reference.record(*made, *buffers)
    return made


def _buffers(trace: Sequence[Tensor | None]) -> TraceBuffers | None:
    if not trace or trace[0] is None:
        return None
    return TraceBuffers(trace[0], *trace[1:])


def _topk_gate_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    index: Tensor,
    per_expert_scale: Tensor,
    dtype: torch.dtype,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = select(backend, probabilities.device, dtype)
    d_scale: Tensor | None
    if chosen is None:
        d_logits, d_scale = reference.topk_gate_bwd(
            grad_probabilities, grad_weights, probabilities, index, per_expert_scale
        )
    else:
        d_logits, d_scale = chosen.topk_gate_bwd(
            grad_probabilities, grad_weights, probabilities, index, per_expert_scale, needed[1]
        )
    logits = probabilities.new_empty(0, dtype=dtype)
    return _returned((d_logits, d_scale), (logits, per_expert_scale), needed)


def _expert_mlp_fwd(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_lhs: Tensor | None,
    gate_up_rhs: Tensor | None,
    down_lhs: Tensor | None,
    down_rhs: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    activation: str,
    expert_parallel: bool,
    save_preactivation: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select(backend, hidden.device, hidden.dtype)
    lora, scales = Lora(gate_up_lhs, gate_up_rhs, down_lhs, down_rhs), Scales(gate_up_scale, down_scale)
    if chosen is not None:
        out, preactivation = chosen.expert_mlp(
            hidden,
            gate_up_proj,
            down_proj,
            index,
            weights,
            lora,
            activation,
            expert_parallel,
            save_preactivation,
            scales,
        )
        return out, hidden.new_empty((0, 0)) if preactivation is None else preactivation
    check_ids(index, gate_up_proj.shape[0], expert_parallel)
    with torch.autocast(hidden.device.type, enabled=False):
        out = reference.expert_mlp(
            hidden,
            gate_up_proj,
            down_proj,
            index,
            weights,
            activation=activation,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
            **_pairs(lora),
        )
    # The reference keeps nothing; the shape is the operator's.
    return out, hidden.new_zeros(_preactivation_shape(index, gate_up_proj, save_preactivation))


def _expert_mlp_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_lhs: Tensor | None,
    gate_up_rhs: Tensor | None,
    down_lhs: Tensor | None,
    down_rhs: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    preactivation: Tensor,
    activation: str,
    expert_parallel: bool,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    lora, scales = Lora(gate_up_lhs, gate_up_rhs, down_lhs, down_rhs), Scales(gate_up_scale, down_scale)
    inputs = (hidden, gate_up_proj, down_proj, weights, *lora)
    needed = tuple(need and x is not None for need, x in zip(needed, inputs, strict=True))
    chosen = select(backend, hidden.device, hidden.dtype)
    if chosen is not None:
        kept = preactivation if preactivation.numel() else None
        grads = chosen.expert_mlp_bwd(
            grad_out,
            hidden,
            gate_up_proj,
            down_proj,
            index,
            weights,
            lora,
            kept,
            activation,
            expert_parallel,
            needed,
            scales,
        )
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            grads = reference.expert_mlp_bwd(
                grad_out,
                hidden,
                gate_up_proj,
                down_proj,
                index,
                weights,
                activation=activation,
                needed=needed,
                gate_up_scale=gate_up_scale,
                down_scale=down_scale,
                **_pairs(lora),
            )
    return _returned(grads, inputs, needed)


def _returned(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Each gradient in the dtype of its input; an empty tensor where none was needed."""
    like = next(x for x in inputs if x is not None)
    return tuple(
        grad.to(x.dtype) if need and grad is not None and x is not None else like.new_empty(0)
        for grad, x, need in zip(grads, inputs, needed, strict=True)
    )


def _pairs(lora: Lora) -> dict[str, Any]:
    def pair(lhs: Tensor | None, rhs: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return None if lhs is None or rhs is None else (lhs, rhs)

    return {
        "gate_up_lora": pair(lora.gate_up_lhs, lora.gate_up_rhs),
        "down_lora": pair(lora.down_lhs, lora.down_rhs),
    }


def _preactivation_shape(index: Tensor, gate_up_proj: Tensor, save: bool) -> tuple[Any, Any]:
    return (index.shape[0] * index.shape[1], gate_up_proj.shape[1]) if save else (0, 0)


for _name, _kernel in (
    ("route_fwd", _route_fwd),
    ("route_traced_fwd", _route_fwd),
    ("route_bwd", _route_bwd),
    ("topk_gate_fwd", _topk_gate_fwd),
    ("topk_gate_traced_fwd", _topk_gate_fwd),
    ("topk_gate_bwd", _topk_gate_bwd),
    ("expert_mlp_fwd", _expert_mlp_fwd),
    ("expert_mlp_bwd", _expert_mlp_bwd),
):
    _LIB.impl(_name, _kernel, "CompositeExplicitAutograd")


def _gate_fake(rows: Tensor, E: Any, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    T = rows.shape[0]
    return (
        rows.new_empty((T, E), dtype=wide),
        rows.new_empty((T, top_k), dtype=wide),
        rows.new_empty((T, top_k), dtype=torch.int64),
    )


def _grad_fakes(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    like = next(x for x in inputs if x is not None)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else like.new_empty(0)
        for x, need in zip(inputs, needed, strict=True)
    )


@torch.library.register_fake("omnigene_fast::route_fwd", lib=_LIB)
@torch.library.register_fake("omnigene_fast::route_traced_fwd", lib=_LIB)
def _route_fwd_fake(hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend, *trace):  # type: ignore[no-untyped-def]
    return _gate_fake(hidden, proj_weight.shape[0], top_k)


@torch.library.register_fake("omnigene_fast::route_bwd", lib=_LIB)
def _route_bwd_fake(  # type: ignore[no-untyped-def]
    grad_probabilities, grad_weights, hidden, proj_weight, scale, per_expert_scale, probabilities, index, eps, needed,
    backend,
):  # fmt: skip
    return _grad_fakes((hidden, proj_weight, scale, per_expert_scale), needed)


@torch.library.register_fake("omnigene_fast::topk_gate_fwd", lib=_LIB)
@torch.library.register_fake("omnigene_fast::topk_gate_traced_fwd", lib=_LIB)
def _topk_gate_fwd_fake(logits, per_expert_scale, top_k, backend, *trace):  # type: ignore[no-untyped-def]
    return _gate_fake(logits, logits.shape[1], top_k)


@torch.library.register_fake("omnigene_fast::topk_gate_bwd", lib=_LIB)
def _topk_gate_bwd_fake(  # type: ignore[no-untyped-def]
    grad_probabilities, grad_weights, probabilities, index, per_expert_scale, dtype, needed, backend
):
    return _grad_fakes((probabilities.new_empty(probabilities.shape, dtype=dtype), per_expert_scale), needed)


@torch.library.register_fake("omnigene_fast::expert_mlp_fwd", lib=_LIB)
def _expert_mlp_fwd_fake(  # type: ignore[no-untyped-def]
    hidden, gate_up_proj, down_proj, index, weights, gate_up_lhs, gate_up_rhs, down_lhs, down_rhs, gate_up_scale,
    down_scale, activation, expert_parallel, save_preactivation, backend,
):  # fmt: skip
    shape = _preactivation_shape(index, gate_up_proj, save_preactivation)
    return hidden.new_empty(hidden.shape), hidden.new_empty(shape)


@torch.library.register_fake("omnigene_fast::expert_mlp_bwd", lib=_LIB)
def _expert_mlp_bwd_fake(  # type: ignore[no-untyped-def]
    grad_out, hidden, gate_up_proj, down_proj, index, weights, gate_up_lhs, gate_up_rhs, down_lhs, down_rhs,
    gate_up_scale, down_scale, preactivation, activation, expert_parallel, needed, backend,
):  # fmt: skip
    inputs = (hidden, gate_up_proj, down_proj, weights, gate_up_lhs, gate_up_rhs, down_lhs, down_rhs)
    return _grad_fakes(inputs, needed)
