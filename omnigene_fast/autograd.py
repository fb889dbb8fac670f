"""Gradients of the operators: one autograd.Function per differentiable operator.

Each `<op>_fwd` gets a kernel for torch's Autograd key, so the rule holds however the operator is reached: the functions
of `omnigene_fast.ops`, `torch.ops.omnigene_fast`, a compiled graph. A backward is one call of `<op>_bwd`, which
computes what `ctx.needs_input_grad` asks for and writes into nothing that it was given. Second derivatives raise.
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import _library  # noqa: F401  (defines the operators that this module adds to)

_LIB = torch.library.Library("omnigene_fast", "FRAGMENT")
_OPS = torch.ops.omnigene_fast
# A Function of one level of `torch.func`: the dispatcher calls these kernels level by level, as those of torch's own
# operators, so that `grad` inside of `vmap` needs no rule of ours.
_Function: Any = torch.autograd.function._SingleLevelFunction


class _Route(_Function):
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
        probabilities, weights, index = _below_autograd(
            _route_op(trace), hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, backend, *trace
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(hidden, proj_weight, scale, per_expert_scale, probabilities, index)
        ctx.eps, ctx.backend, ctx.rest = eps, backend, 4 + len(trace)
        return probabilities, weights, index

    @staticmethod
    def backward(ctx: Any, grad_probabilities: Tensor | None, grad_weights: Tensor | None, _: None) -> Any:
        needed = list(ctx.needs_input_grad[:4])
        if grad_probabilities is None and grad_weights is None:
            return (None,) * (4 + ctx.rest)
        grads = _OPS.route_bwd(grad_probabilities, grad_weights, *ctx.saved_tensors, ctx.eps, needed, ctx.backend)
        return *_none_where_not(needed, grads), *(None,) * ctx.rest


class _TopkGate(_Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, per_expert_scale: Tensor, top_k: int, backend: str, *trace: Tensor | None
    ) -> Any:
        probabilities, weights, index = _below_autograd(
            _gate_op(trace), logits, per_expert_scale, top_k, backend, *trace
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(probabilities, index, per_expert_scale)
        ctx.dtype, ctx.backend, ctx.rest = logits.dtype, backend, 2 + len(trace)
        return probabilities, weights, index

    @staticmethod
    def backward(ctx: Any, grad_probabilities: Tensor | None, grad_weights: Tensor | None, _: None) -> Any:
        needed = list(ctx.needs_input_grad[:2])
        if grad_probabilities is None and grad_weights is None:
            return (None,) * (2 + ctx.rest)
        grads = _OPS.topk_gate_bwd(grad_probabilities, grad_weights, *ctx.saved_tensors, ctx.dtype, needed, ctx.backend)
        return *_none_where_not(needed, grads), *(None,) * ctx.rest


class _ExpertMlp(_Function):
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
        out, preactivation = _below_autograd(
            _OPS.expert_mlp_fwd, *inputs, activation, expert_parallel, save_preactivation, backend
        )
        ctx.mark_non_differentiable(preactivation)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, preactivation)
        ctx.options = activation, expert_parallel
        ctx.backend = backend
        return out, preactivation

    @staticmethod
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
    if forward_ad._current_level >= 0:  # a Function without a forward rule says so if an input has a tangent
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # which a Function's forward has switched off for the levels below as well
                return op(*args)
        return op(*args)


def _apply(function: Any, *args: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return function.apply(*args)
    return function.apply(*args)


def _route_op(trace: tuple[Tensor | None, ...]) -> Any:
    return _OPS.route_traced_fwd if trace else _OPS.route_fwd


def _gate_op(trace: tuple[Tensor | None, ...]) -> Any:
    return _OPS.topk_gate_traced_fwd if trace else _OPS.topk_gate_fwd


def _route(*args: Any) -> Any:
    if _wanted(*args[:4]):
        return _apply(_Route, *args)
    return _below_autograd(_route_op(args[8:]), *args)


def _topk_gate(*args: Any) -> Any:
    if _wanted(*args[:2]):
        return _apply(_TopkGate, *args)
    return _below_autograd(_gate_op(args[4:]), *args)


def _expert_mlp(*args: Any) -> Any:
    if _wanted(*args[:9]):
        return _apply(_ExpertMlp, *args)
    return _below_autograd(_OPS.expert_mlp_fwd, *args)


class _Backward(_Function):
    """A backward, of which there is no derivative: whoever asks for one is told, at every level of `torch.func`."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        return _below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "omnigene_fast: second derivatives are not implemented; call omnigene_fast.restore(model) before you ask"
            " for them."
        )


def _backward_of(name: str) -> Any:
    op = getattr(_OPS, name)

    def run(*args: Any) -> Any:
        if _wanted(*args):
            return _apply(_Backward, op, *args)
        return _below_autograd(op, *args)

    return run


for _name in ("route_bwd", "topk_gate_bwd", "expert_mlp_bwd"):
    _LIB.impl(_name, _backward_of(_name), "Autograd")
_LIB.impl("route_fwd", _route, "Autograd")
_LIB.impl("route_traced_fwd", _route, "Autograd")
_LIB.impl("topk_gate_fwd", _topk_gate, "Autograd")
_LIB.impl("topk_gate_traced_fwd", _topk_gate, "Autograd")
_LIB.impl("expert_mlp_fwd", _expert_mlp, "Autograd")
