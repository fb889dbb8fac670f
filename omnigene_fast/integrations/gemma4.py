"""Gemma-4's router on this package's operators: a forward for `Gemma4TextRouter` instances.

It is an instance attribute, so that the class, its hooks and transformers' output recording stay as they are.
"""

import functools
import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextRouter

from .. import ops
from .bound import BoundMethod, is_unhooked
from .experts import is_packed

logger = logging.getLogger("omnigene_fast")

# Instance attribute of an accelerated router: None, or its ops.TraceBuffers while a traced call runs. It is always
# there, because a compiled graph notices a value that changes, and not an attribute that appears.
TRACE = "_omnigene_fast_trace"


def is_router(module: nn.Module) -> bool:
    """Whether `module` computes what `Gemma4TextRouter` computes (a subclass with a forward of its own does not)."""
    return type(module).forward is Gemma4TextRouter.forward


def routers_by_layer(model: nn.Module) -> dict[int, Any]:
    """The routers of `model` by the index of their decoder layer, in order: layers without experts are not counted
    away.

    Raises:
        ValueError: `model` has no Gemma-4 router, or two with one index.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not is_router(module):
            continue
        numbers = re.findall(r"\blayers\.(\d+)\.", f"{name}.")
        if not numbers or int(numbers[-1]) in found:
            raise ValueError(
                "model: expected one Gemma-4 router per decoder layer, in a list named layers, got another one at"
                f" {name or 'the top'}; pass the language model alone, without PEFT's modules_to_save on its routers."
            )
        found[int(numbers[-1])] = module
    if not found:
        raise ValueError(
            f"model: expected a Gemma-4 with mixture-of-experts layers, got a {type(model).__name__} without a router."
        )
    return dict(sorted(found.items()))


def is_accelerated(router: nn.Module) -> bool:
    """Whether the fused forward runs for `router`, which then writes into the buffers in its attribute `TRACE`."""
    return _is_ours(router.__dict__.get("forward")) or _is_ours(router.__dict__.get("_old_forward"))


def set_trace(router: nn.Module, buffers: ops.TraceBuffers | None) -> None:
    """From now on the forward of `router`, or a hook that stands in for it, writes into `buffers`, or nowhere."""
    if buffers is None and not is_accelerated(router):
        router.__dict__.pop(TRACE, None)
    else:
        router.__dict__[TRACE] = buffers


def numerics_of(router: nn.Module) -> str:
    """How `router` rounds: "hf" or "fp32" as accelerated, "stock" otherwise."""
    for slot in ("forward", "_old_forward"):
        forward = router.__dict__.get(slot)
        if _is_ours(forward):
            return str(forward.keywords["numerics"])  # type: ignore[union-attr]
    return "stock"


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
    router.__dict__.setdefault(TRACE, None)
    router.__dict__[slot] = BoundMethod(_router_forward, router, numerics=numerics, backend=backend)


def uninstall(module: nn.Module) -> None:
    """Take our forward out of `module`, wherever it is now."""
    if _is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    if _is_ours(module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)
    module.__dict__.pop(TRACE, None)


def warn_of_quantised(routers: list[Any]) -> None:
    """Say once if the projection of a router, or the one inside its LoRA, is quantised."""
    for router in routers:
        proj = router.proj
        while isinstance(getattr(proj, "base_layer", None), nn.Module):
            proj = proj.base_layer
        weight = getattr(proj, "weight", None)
        # bitsandbytes keeps floating weights until the model moves to the GPU.
        if isinstance(weight, Tensor) and (
            not weight.dtype.is_floating_point
            or weight.element_size() == 1
            or is_packed(weight)
            or type(proj).__module__.startswith("bitsandbytes.")
        ):
            _say_that_it_is_quantised(type(proj).__name__)
            return


@functools.cache
def _say_that_it_is_quantised(kind: str) -> None:
    logger.warning(
        "router.proj is quantised (%s): tokens near a tie go to other experts than in the model that was trained; load"
        ' it with llm_int8_skip_modules=["router.proj", "lm_head"] in BitsAndBytesConfig (4 and 8 bits), or leave it'
        " out in the tool that quantised it.",
        kind,
    )


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, BoundMethod) and forward.func is _router_forward


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
    top_k, trace = router.config.top_k_experts, getattr(router, TRACE)
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
                trace=trace,
            )
    # Up to the logits as transformers does it, so that whatever wraps the projection (LoRA, 4-bit, hooks) has its say.
    logits = proj(norm(hidden_states) * scale * router.scalar_root_size)
    return ops.topk_gate(logits, per_expert_scale, top_k=top_k, backend=backend, trace=trace)


def _is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch has no answer for meta


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None and is_unhooked(module)


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is Gemma4RMSNorm and not module.with_scale and is_unhooked(module)
