"""Gradients of the operators. This version has none: a backward raises one sentence instead of giving a wrong gradient.

Each operator gets a kernel for torch's Autograd key, so the rule holds however the operator is reached: the functions
of `omnigene_fast.ops`, `torch.ops.omnigene_fast`, a compiled graph. The forward pass in grad mode works as usual.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (defines the operators that this module adds to)

_LIB = torch.library.Library("omnigene_fast", "FRAGMENT")

# An operator rather than a plain `raise`: torch.compile traces the backward while it compiles the forward.
_LIB.define(
    "backward_missing(Tensor grad, SymInt[] size, ScalarType dtype, str op) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _backward_missing(grad: Tensor, size: list[int], dtype: torch.dtype, op: str) -> Tensor:
    raise NotImplementedError(
        f"omnigene_fast: {op} has no backward in this version; run inference under torch.no_grad(), "
        "or call omnigene_fast.restore(model) to train with the stock layers."
    )


_LIB.impl("backward_missing", _backward_missing, "CompositeExplicitAutograd")


@torch.library.register_fake("omnigene_fast::backward_missing", lib=_LIB)
def _backward_missing_fake(grad: Tensor, size: list[int], dtype: torch.dtype, op: str) -> Tensor:
    return grad.new_empty(size, dtype=dtype)


class _ForwardOnly(torch.autograd.Function):
    """Runs an operator; its backward calls `backward_missing` once for each input that wants a gradient."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], name: str, *args: Any) -> Any:
        ctx.name = name
        # Shapes, not the tensors: nothing is kept alive for a backward that never comes.
        ctx.inputs = [(arg.shape, arg.dtype) if isinstance(arg, Tensor) else None for arg in args]
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*args)
        ctx.mark_non_differentiable(*(t for t in (out if isinstance(out, tuple) else ()) if not t.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (
            None,
            None,
            *(
                torch.ops.omnigene_fast.backward_missing(grads[0], *shape_and_dtype, ctx.name) if needed else None
                for needed, shape_and_dtype in zip(ctx.needs_input_grad[2:], ctx.inputs, strict=True)
            ),
        )


def _register(name: str, tensors: int) -> None:
    """Give `<name>_fwd`, whose first `tensors` arguments may want a gradient, its kernel for the Autograd key."""
    op = getattr(torch.ops.omnigene_fast, f"{name}_fwd").default

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(arg.requires_grad for arg in args[:tensors]):
            return _ForwardOnly.apply(op, name, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _LIB.impl(f"{name}_fwd", kernel, "Autograd")


_register("route", 4)
_register("topk_gate", 2)
_register("expert_mlp", 5)
