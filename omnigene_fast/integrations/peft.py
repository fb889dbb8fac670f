"""LoRA on the experts with stock PEFT, `LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])`.

PEFT wraps the experts in one `ParamWrapper` per parameter, whose forward registers a parametrization; torch evaluates
it once when it is registered, so the merged weight, of the size of all experts, is built in every forward. A wrapper
around experts that run on this package gets an instance attribute `forward` that hands its two factors down to
`experts_forward` instead. Whatever is not a plain sum of active adapters runs PEFT's own way: disabled and merged
adapters, mixed batches, parameters of another layout.

Onto experts stored in 8 bits PEFT puts float32 factors, as onto every quantised layer. Its own way, which adds to the
weight, cannot serve them: an instance attribute `merge` brings such experts back to the model's dtype before it merges.
"""

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from . import lowbit
from .bound import BoundMethod
from .experts import NAME, Factors, implementation, is_experts, is_watched, scaled

logger = logging.getLogger("omnigene_fast")


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` is PEFT's LoRA around a parameter of an experts module."""
    cls = _wrapper_class()
    return cls is not None and isinstance(module, cls) and is_experts(_innermost(module, cls))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter, of any kind, into `model`."""
    cls = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return cls is not None and any(isinstance(module, cls) for module in model.modules())


def install(wrapper: nn.Module) -> None:
    """Give `wrapper` our forward, unless another tool's is there."""
    slot = "_old_forward" if "_old_forward" in wrapper.__dict__ else "forward"  # behind the accelerate library's hook
    if slot == "_old_forward" or slot not in wrapper.__dict__ or _is_ours(wrapper.__dict__[slot]):
        wrapper.__dict__[slot] = BoundMethod(_wrapper_forward, wrapper)
        wrapper.__dict__["merge"] = BoundMethod(_wrapper_merge, wrapper)
        if not hasattr(wrapper, "get_delta_factors"):
            _say_that_peft_is_old()


def uninstall(module: nn.Module) -> None:
    """Take our forward out of `module`, wherever it is now."""
    if _is_ours(module.__dict__.get("forward")):
        del module.__dict__["forward"]
    if _is_ours(module.__dict__.get("_old_forward")):
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)
    merge = module.__dict__.get("merge")
    if isinstance(merge, BoundMethod) and merge.func is _wrapper_merge:
        del module.__dict__["merge"]


@functools.cache
def _say_that_peft_is_old() -> None:
    logger.warning(
        "This PEFT builds the merged weights of all experts in every forward, because it does not tell the factors of"
        " its LoRA; install peft>=0.21."
    )


@functools.cache
def watch() -> None:
    """From now on `install` on every wrapper that is put around experts that run on this package."""
    nn.modules.module.register_module_module_registration_hook(_on_registration)


def _on_registration(module: nn.Module, name: str, submodule: nn.Module) -> None:
    # torch calls this for every submodule that is assigned anywhere, and the assignment comes after it.
    cls = _wrapper_class() if name == "base_layer" else None
    if cls is not None and isinstance(module, cls):
        base = _innermost(submodule, cls)
        if is_experts(base) and implementation(base) == NAME:
            install(module)


def _wrapper_class() -> type | None:
    """PEFT's class if PEFT is imported; None also for a PEFT that cannot adapt parameters."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)


def _innermost(module: Any, wrapper_class: type) -> nn.Module:
    while isinstance(module, wrapper_class):
        module = module.base_layer  # type: ignore[attr-defined]
    return module


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, BoundMethod) and forward.func is _wrapper_forward


def _wrapper_forward(wrapper: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`ParamWrapper.forward`, but the factors of active adapters go down to `experts_forward` in the keyword `lora`."""
    pairs = None if kwargs.get("adapter_names") or wrapper.disable_adapters or wrapper.merged else _factors(wrapper)
    if pairs is None:
        _check_that_peft_can(wrapper, kwargs)
        return type(wrapper).forward(wrapper, x, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    lora = dict(kwargs.pop("lora", {}))
    lora[wrapper.parameter_name] = [*lora.get(wrapper.parameter_name, ()), *pairs]
    return wrapper.base_layer(x, *args, lora=lora, **kwargs)


def _check_that_peft_can(wrapper: Any, kwargs: dict[str, Any]) -> None:
    """ValueError if PEFT's own way would add an adapter to a weight stored in 8 bits."""
    if lowbit.bits(wrapper.get_base_layer()) is None or wrapper.disable_adapters or kwargs.get("adapter_names"):
        return
    raise ValueError(
        f"model: expected adapters on experts stored in 8 bits to run on omnigene_fast, got {wrapper.parameter_name}"
        f" under the experts implementation {implementation(wrapper.get_base_layer())!r}; call"
        f' model.set_experts_implementation("{NAME}") with peft>=0.21, or omnigene_fast.restore(model).'
    )


def _wrapper_merge(wrapper: Any, *args: Any, **kwargs: Any) -> None:
    """`ParamWrapper.merge`, after experts stored in 8 bits are back in the model's dtype."""
    experts = wrapper.get_base_layer()
    if lowbit.bits(experts) is not None:
        _say_that_merging_thaws()
        lowbit.thaw(experts, frozen=True)
    type(wrapper).merge(wrapper, *args, **kwargs)


@functools.cache
def _say_that_merging_thaws() -> None:
    logger.warning(
        "Merging an adapter brings the experts that it adapts back from 8 bits to the model's dtype, because the sum"
        " would be rounded once more; accelerate(model, experts_dtype=...) stores the merged model in 8 bits again."
    )


def _factors(wrapper: Any) -> list[Factors] | None:
    """The factors of the active adapters; None if they, or the experts, are not what `experts_forward` takes."""
    experts = wrapper.get_base_layer()
    if implementation(experts) != NAME or is_watched(experts) or not hasattr(wrapper, "get_delta_factors"):
        return None
    if wrapper.parameter_name not in ("gate_up_proj", "down_proj"):
        return None
    low = lowbit.bits(experts) is not None
    weight, pairs = lowbit.codes(experts, wrapper.parameter_name) if low else wrapper.get_param(), []
    dtype = lowbit.compute_dtype(experts) if low else weight.dtype
    for adapter in wrapper.active_adapters:
        if adapter in wrapper.lora_A:
            if low:
                lhs, rhs, scaling = _delta_factors(wrapper, adapter, dtype)
            else:
                lhs, rhs, scaling = wrapper.get_delta_factors(adapter)
            if dtype not in ops.DTYPES or (*lhs.shape[:2], rhs.shape[2]) != tuple(weight.shape):
                return None
            pairs.append((scaled(lhs, scaling), rhs))
    return pairs


def _delta_factors(wrapper: Any, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """`ParamWrapper.get_delta_factors` in `dtype`; PEFT's would cast the factors to the 8 bits of the weight."""
    E = wrapper.num_experts
    rhs = wrapper.lora_A[adapter].weight  # [E * r, in], expert-major
    lhs = wrapper.lora_B[adapter].weight  # [out, r * E], rank-major
    return (
        lhs.reshape(lhs.shape[0], -1, E).permute(2, 0, 1).to(dtype),
        rhs.reshape(E, -1, rhs.shape[1]).to(dtype),
        wrapper.scaling[adapter],
    )
