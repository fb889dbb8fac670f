"""Gemma-4's router on this package's operators: a forward for `Gemma4TextRouter` instances.

It is an instance attribute, so that the class, its hooks and transformers' output recording stay as they are, and a
`functools.partial`, so that a deep copy or a pickle of the model is bound to its own router.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextRouter

from .. import ops


def is_router(module: nn.Module) -> bool:
    """Whether `module` computes what `Gemma4TextRouter` computes (a subclass with a forward of its own does not)."""
    return type(module).forward is Gemma4TextRouter.forward


def forward_slot(router: nn.Module) -> str:
    """The instance attribute that holds a router's own forward; ValueError if another tool's forward is there.

    With the device hooks of the accelerate library that is `_old_forward`, behind the hook.
    """
    if "_old_forward" in router.__dict__:
        return "_old_forward"
    if "forward" in router.__dict__ and not _is_ours(router.__dict__["forward"]):
        raise ValueError(
            f"model: expected the class's own forward on every {type(router).__name__}, got one that another tool put"
            " there; call accelerate before that tool."
        )
    return "forward"


def install(router: nn.Module, slot: str, *, numerics: str, backend: str) -> None:
    """Put our forward into `slot` (from `forward_slot`)."""
    router.__dict__[slot] = functools.partial(_router_forward, router, numerics=numerics, backend=backend)


def uninstall(module: nn.Module) -> None:
    """Take our forward out of `module`, wherever it is now."""
    if _is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    if _is_ours(module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _router_forward


def _router_forward(
    router: Any, hidden_states: Tensor, *, numerics: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Gemma4TextRouter.forward` returns: probabilities [T, E], weights [T, K], index [T, K] for hidden [T, H]."""
    if hidden_states.dim() != 2:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = _router_forward(router, rows, numerics=numerics, backend=backend)
        probabilities, weights, index = (tensor.unflatten(0, hidden_states.shape[:-1]) for tensor in out)
        return probabilities, weights, index
    norm, proj, scale, per_expert_scale = router.norm, router.proj, router.scale, router.per_expert_scale
    top_k = router.config.top_k_experts
    if _is_plain_linear(proj) and _is_plain_norm(norm):
        weight, dtype = proj.weight, hidden_states.dtype
        if (
            weight.dtype == scale.dtype == per_expert_scale.dtype == dtype
            and type(weight) in (nn.Parameter, Tensor)  # not a quantised or sharded subclass
            and not _is_autocast(hidden_states.device.type)
        ):
            return ops.route(
                hidden_states,
                weight,
                scale,
                per_expert_scale,
                top_k=top_k,
                eps=norm.eps,
                numerics=numerics,
                backend=backend,
            )
    # Up to the logits as transformers does it, so that whatever wraps the projection (LoRA, 4-bit, hooks) has its say.
    logits = proj(norm(hidden_states) * scale * router.scalar_root_size)
    return ops.topk_gate(logits, per_expert_scale, top_k=top_k, backend=backend)


def _is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch has no answer for meta


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None and _is_unhooked(module)


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is Gemma4RMSNorm and not module.with_scale and _is_unhooked(module)


def _is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` does what its class's forward does, and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
