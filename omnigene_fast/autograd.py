"""Gradients of the operators: one autograd.Function per differentiable operator.

Each `<op>_fwd` gets a kernel for torch's Autograd key, so the rule holds however the operator is reached: the functions
of `omnigene_fast.ops`, `torch.ops.omnigene_fast`, a compiled graph. A backward is one call of `<op>_bwd`, which
computes what `ctx.needs_input_grad` asks for and writes into nothing that it was given. Second derivatives raise.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  (defines the operators that this module adds to)

_LIB = torch.library.Library("omnigene_fast", "FRAGMENT")
_OPS = torch.ops.omnigene_fast


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        proj_weight: Tensor,
        scale: Tensor,
        per_expert_scale: Tensor,
        top_k: int,
        eps: float,
        numerics: str,
        backend: str,
        *trace: Tensor | None,
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            probabilities, weights, index = _route_op(trace)(
                hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend, *trace
            )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(hidden, proj_weight, scale, per_expert_scale, probabilities, index)
        ctx.eps, ctx.backend, ctx.rest = eps, backend, 4 + len(trace)
        return probabilities, weights, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probabilities: Tensor | None, grad_weights: Tensor | None, _: None) -> Any:
        needed = list(ctx.needs_input_grad[:4])
        if grad_probabilities is None and grad_weights is None:
            return (None,) * (4 + ctx.rest)
        grads = _OPS.route_bwd(grad_probabilities, grad_weights, *ctx.saved_tensors, ctx.eps, needed, ctx.backend)
        return *_none_where_not(needed, grads), *(None,) * ctx.rest


class _TopkGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, per_expert_scale: Tensor, top_k: int, backend: str, *trace: Tensor | None
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            probabilities, weights, index = _gate_op(trace)(logits, per_expert_scale, top_k, backend, *trace)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(probabilities, index, per_expert_scale)
        ctx.dtype, ctx.backend, ctx.rest = logits.dtype, backend, 2 + len(trace)
        return probabilities, weights, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probabilities: Tensor | None, grad_weights: Tensor | None, _: None) -> Any:
        needed = list(ctx.needs_input_grad[:2])
        if grad_probabilities is None and grad_weights is None:
            return (None,) * (2 + ctx.rest)
        grads = _OPS.topk_gate_bwd(grad_probabilities, grad_weights, *ctx.saved_tensors, ctx.dtype, needed, ctx.backend)
        return *_none_where_not(needed, grads), *(None,) * ctx.rest


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Any:
        factors = gate_up_lhs, gate_up_rhs, down_lhs, down_rhs
        inputs = (hidden, gate_up_proj, down_proj, index, weights, *factors, gate_up_scale, down_scale)
        with torch._C._AutoDispatchBelowAutograd():
            out, preactivation = _OPS.expert_mlp_fwd(*inputs, activation, expert_parallel, save_preactivation, backend)
        ctx.mark_non_differentiable(preactivation)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, preactivation)
        ctx.options = activation, expert_parallel
        ctx.backend = backend
        return out, preactivation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> Any:
        if grad_out is None:
            return (None,) * 15
        wants = ctx.needs_input_grad
        needed = [*wants[:3], *wants[4:9]]  # all but index
        grads = _OPS.expert_mlp_bwd(grad_out, *ctx.saved_tensors, *ctx.options, needed, ctx.backend)
        kept = _none_where_not(needed, grads)
        return *kept[:3], None, *kept[3:], *(None,) * 6


def _none_where_not(needed: list[bool], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for need, grad in zip(needed, grads, strict=True))


def _wanted(*inputs: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _route_op(trace: tuple[Tensor | None, ...]) -> Any:
    return _OPS.route_traced_fwd if trace else _OPS.route_fwd


def _gate_op(trace: tuple[Tensor | None, ...]) -> Any:
    return _OPS.topk_gate_traced_fwd if trace else _OPS.topk_gate_fwd


def _route(*args: Any) -> Any:
    if _wanted(*args[:4]):
        return _Route.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _route_op(args[8:])(*args)


def _topk_gate(*args: Any) -> Any:
    if _wanted(*args[:2]):
        return _TopkGate.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _gate_op(args[4:])(*args)


def _expert_mlp(*args: Any) -> Any:
    if _wanted(*args[:9]):
        return _ExpertMlp.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.expert_mlp_fwd(*args)


_LIB.impl("route_fwd", _route, "Autograd")
_LIB.impl("route_traced_fwd", _route, "Autograd")
_LIB.impl("topk_gate_fwd", _topk_gate, "Autograd")
_LIB.impl("topk_gate_traced_fwd", _topk_gate, "Autograd")
_LIB.impl("expert_mlp_fwd", _expert_mlp, "Autograd")
