"""Experts of a transformers model stored in 8 bits: where `accelerate(model, experts_dtype=...)` puts them.

`gate_up_proj` and `down_proj` stay the same `nn.Parameter` objects under the same names, so that PEFT, device moves and
DDP find them, and hold int8, or the bits of e4m3 as uint8. The scales are buffers that hold the bits of float32 as
int32. Neither is a floating type, and so `model.to(dtype)`, `.half()` and `.double()` leave both alone, as torch casts
floating tensors only. A buffer of one element in the dtype that the model computes in is cast with it: the experts
compute in its dtype, as they would in that of their weights. No buffer is persistent: the keys of the state dict stay,
and what it holds under them are weights in the model's dtype.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from tqdm import tqdm

from .. import lowbit, ops
from . import rounded

logger = logging.getLogger("omnigene_fast")

BITS = "_omnigene_fast_bits"  # instance attribute of an experts module that is stored in 8 bits
PROJECTIONS = ("gate_up_proj", "down_proj")

_SCALES = {"gate_up_proj": "_omnigene_fast_gate_up_scale", "down_proj": "_omnigene_fast_down_scale"}
_DTYPE = "_omnigene_fast_dtype"
_SEEN = "_omnigene_fast_seen_"  # with a projection's name: the buffer of scales of which there is a plain tensor
_LARGE = 2**30  # elements; below that rounding takes no time that anybody waits for


@dataclasses.dataclass(frozen=True)
class Bits:
    """The format, and whether the projections required a gradient before they were stored in it."""

    format: str
    requires_grad: tuple[bool, bool]


def bits(experts: nn.Module) -> Bits | None:
    """How `experts` are stored; None: as plain floating weights."""
    return experts.__dict__.get(BITS)


def compute_dtype(experts: Any) -> torch.dtype:
    """The dtype that experts stored in 8 bits compute in."""
    dtype: torch.dtype = getattr(experts, _DTYPE).dtype
    return dtype


def stored(experts: Any, name: str) -> tuple[Tensor, Tensor]:
    """A projection as `ops.expert_mlp` takes it: [E, rows, columns] int8 or float8_e4m3fn, and [E, rows] float32."""
    weight, scale = _plain(experts, name)  # nothing is copied
    return weight if weight.dtype == torch.int8 else weight.view(torch.float8_e4m3fn), scale.view(torch.float32)


def codes(experts: Any, name: str) -> Tensor:
    """The stored bits of a projection as the parameter holds them: [E, rows, columns] int8 or uint8."""
    return _plain(experts, name)[0]


def _plain(experts: Any, name: str) -> tuple[Tensor, Tensor]:
    """Codes and the bits of the scales [E, rows] of a projection as plain tensors, but for a sharded parameter."""
    found: tuple[Tensor, Tensor] | None = experts.__dict__.get(rounded.CODES, {}).get(_SCALES[name])
    weight, scales = experts._parameters.get(name), experts._buffers[_SCALES[name]]
    if found is not None and (torch.compiler.is_compiling() or _is_current(experts, name, weight, scales)):
        return found
    known = experts.__dict__.setdefault(rounded.CODES, {})
    if isinstance(weight, rounded.Rounded) and not isinstance(weight, rounded.RoundedParameter):
        weight = experts._parameters[name] = nn.Parameter(rounded.plain(weight), requires_grad=False)
    if type(weight) is nn.Parameter:  # a tool has made it anew
        rounded.bind(weight, experts, _SCALES[name], _DTYPE, experts.__dict__[BITS].format, scales)
        made: tuple[Tensor, Tensor] = known[_SCALES[name]]
        return made
    scale = rounded.plain(scales)
    if isinstance(weight, rounded.RoundedParameter):
        codes = rounded.plain(weight)
    elif weight is None and found is not None:  # parametrised
        codes = found[0]
    else:  # sharded, or fake
        known.pop(_SCALES[name], None)
        return getattr(experts, name), scale
    known[_SCALES[name]] = codes, scale
    experts.__dict__[_SEEN + name] = scales
    return codes, scale


def _is_current(experts: Any, name: str, weight: Any, scales: Any) -> bool:
    """Whether the plain tensors are those of this parameter, which keeps its own up to date, and of this buffer."""
    return type(weight) is rounded.RoundedParameter and experts.__dict__.get(_SEEN + name) is scales


def check_not_offloaded(experts: nn.Module) -> None:
    """ValueError if the accelerate library moves the weights of `experts` in and out around each call.

    It takes them from the state dict, where they are floating, and would cast those to the dtype of the 8 bits.
    """
    hook = experts.__dict__.get("_hf_hook")
    if hook is not None and any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
        raise ValueError(
            "model: expected experts stored in 8 bits to stay on their device, got experts that the accelerate library"
            " offloads; load it with device_map='cpu', call accelerate, then model.to('cuda')."
        )


def plan(model: nn.Module, experts: Iterable[nn.Module], format: str) -> dict[nn.Module, list[Tensor]]:
    """Everything that can speak against storing `experts` in `format`, checked; nothing is changed.

    Returns:
        for each module that is not yet stored in it, the scales of its two projections.

    Raises:
        ValueError: an unknown format, weights that are not plain, shared, with a gradient, merged with an adapter or
            not finite, or experts stored in the other format.
    """
    lowbit.check_format("experts_dtype", format)
    names = {id(module): name for name, module in model.named_modules()}
    chosen: list[Any] = []
    seen: dict[int, str] = {}
    for module in experts:
        present = bits(module)
        if present is not None and present.format != format:
            raise ValueError(
                f"experts_dtype: expected {present.format!r}, in which the experts are stored, got {format!r}; call"
                " omnigene_fast.restore(model) first, which keeps the first rounding, or load the model again."
            )
        if present is not None:
            continue
        for name in PROJECTIONS:
            full = f"{names[id(module)]}.{name}".lstrip(".")
            _check(module, name, full, format)
            other = seen.setdefault(id(module._parameters[name]), full)
            if other != full:
                raise _refusal(format, full, f"one parameter with {other}", "give each experts module its own weights")
        chosen.append(module)
    _check_not_merged(model, chosen, format)

    scales: dict[nn.Module, list[Tensor]] = {}
    for module in _progress(chosen, "scales of the experts"):
        scales[module] = []
        for name in PROJECTIONS:
            scale = lowbit.row_scales(getattr(module, name), format)
            expert = lowbit.first_not_finite(scale)
            if expert is not None:
                raise ValueError(
                    f"model: expected finite weights to store in {format}, got NaN or infinity in"
                    f" {names[id(module)]}.{name}, expert {expert}; load the checkpoint again."
                )
            scales[module].append(scale)
    return scales


def _check(module: Any, name: str, full: str, format: str) -> None:
    """ValueError unless a parameter is a plain weight that may be frozen and rounded."""
    if "parametrizations" in module._modules and name in module.parametrizations:
        raise _refusal(format, full, "parametrised", "remove the parametrization first")
    weight = module._parameters.get(name)
    if type(weight) not in (nn.Parameter, FakeTensor):  # a subclass says what it is by its type
        raise _refusal(
            format,
            full,
            f"a {type(weight).__name__} (quantised or sharded by another tool)",
            "call accelerate with experts_dtype on the plain model, before that tool",
        )
    if weight.dtype not in ops.DTYPES:
        raise _refusal(format, full, f"stored as {weight.dtype}", "load the model in a floating dtype")
    if weight.grad is not None:
        raise _refusal(
            format,
            full,
            "being trained (it has a gradient)",
            "call accelerate before training, or model.zero_grad() if these experts are to be frozen from now on",
        )
    if weight.device.type == "meta" and "_hf_hook" in module.__dict__:
        raise _refusal(
            format,
            full,
            "offloaded by the accelerate library",
            "load it with device_map='cpu', call accelerate, then model.to('cuda')",
        )


def _check_not_merged(model: nn.Module, experts: Sequence[nn.Module], format: str) -> None:
    wanted = {id(module) for module in experts}
    wrapper: Any
    for wrapper in model.modules():
        if not getattr(wrapper, "merged_adapters", None) or not hasattr(wrapper, "parameter_name"):
            continue
        if id(wrapper.get_base_layer()) in wanted:
            raise _refusal(
                format,
                wrapper.parameter_name,
                f"merged with the adapter {wrapper.merged_adapters[0]!r}",
                "call model.unmerge_adapter() or model.merge_and_unload() first",
            )


def _refusal(format: str, name: str, what: str, way_out: str) -> ValueError:
    return ValueError(f"experts_dtype: {format} cannot store {name}, which is {what}; {way_out}.")


def store(scales: Mapping[nn.Module, Sequence[Tensor]], format: str) -> None:
    """Store each module of a `plan` in `format`.

    A module changes as a whole, and whatever stops this (memory that runs out) leaves a model that runs, whose
    remaining modules a second call stores.
    """
    for module in _progress(list(scales), f"experts to {format}"):
        _store(module, scales[module], format)


@torch.no_grad()
def _store(module: Any, scales: Sequence[Tensor], format: str) -> None:
    weights = [module._parameters[name] for name in PROJECTIONS]
    made = [lowbit.round_rows(weight, scale, format) for weight, scale in zip(weights, scales, strict=True)]
    module.register_buffer(_DTYPE, weights[0].new_zeros(1), persistent=False)
    module.__dict__[BITS] = Bits(format, (weights[0].requires_grad, weights[1].requires_grad))
    for name, weight, scale, low in zip(PROJECTIONS, weights, scales, made, strict=True):
        module.register_buffer(_SCALES[name], _scales(scale), persistent=False)
        weight.requires_grad_(False)
        weight.data = low if low.dtype == torch.int8 else low.view(torch.uint8)  # the same Parameter, other data
        rounded.bind(weight, module, _SCALES[name], _DTYPE, format, getattr(module, _SCALES[name]))
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_read)


def _scales(scale: Tensor) -> Tensor:
    # Not of a fake tensor, which has a class of its own.
    return scale.view(torch.int32).as_subclass(rounded.Scales) if type(scale) is Tensor else scale.view(torch.int32)


@torch.no_grad()
def thaw(module: Any, *, frozen: bool = False) -> None:
    """Back to plain weights in the dtype that `module` computes in; they keep the rounding.

    Args:
        module: an experts module.
        frozen: leave them without a gradient, even if they required one before they were stored in 8 bits.
    """
    present = bits(module)
    if present is None:
        return
    dtype = compute_dtype(module)
    made = [lowbit.dequantise(*stored(module, name), dtype) for name in PROJECTIONS]
    for name, weight, required in zip(PROJECTIONS, made, present.requires_grad, strict=True):
        rounded.unbind(module._parameters[name])
        module._parameters[name].data = weight
        module._parameters[name].requires_grad_(required and not frozen)
        delattr(module, _SCALES[name])
    delattr(module, _DTYPE)
    del module.__dict__[BITS]
    for attribute in (rounded.CODES, *(_SEEN + name for name in PROJECTIONS)):
        module.__dict__.pop(attribute, None)
    for hooks, ours in ((module._state_dict_hooks, _write), (module._load_state_dict_pre_hooks, _read)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
            del hooks[key]


def thaw_all(modules: Iterable[nn.Module], *, frozen: bool) -> None:
    """`thaw` every module that is stored in 8 bits, and say once what the weights are now."""
    chosen = [module for module in modules if bits(module) is not None]
    for module in chosen:
        if _is_sharded(module._parameters["gate_up_proj"]):
            raise ValueError(
                "model: expected experts stored in 8 bits on one device, got a model sharded by FSDP; save its state"
                " dict, and load it into a stock model."
            )
    for module in chosen:
        format, dtype = module.__dict__[BITS].format, compute_dtype(module)
        if module is chosen[0]:
            logger.warning(
                "The experts are stored as %s again and keep the rounding of %s; the weights from before are in the"
                " checkpoint only.",
                str(dtype).removeprefix("torch."),
                format,
            )
    for module in _progress(chosen, "experts from 8 bits"):
        thaw(module, frozen=frozen)


# --- the state dict ---------------------------------------------------------------------------------------------------


def _write(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put weights in the model's dtype where torch put the 8 bits; in main memory, as a GPU may have no room."""
    dtype = compute_dtype(module)
    for name in PROJECTIONS:
        if prefix + name in state_dict:
            weight = module._parameters[name]
            if _is_sharded(weight):
                state_dict[prefix + name] = _shards(weight, stored(module, name)[1], dtype)
                continue
            device = weight.device if weight.device.type == "meta" else torch.device("cpu")
            state_dict[prefix + name] = lowbit.dequantise(*stored(module, name), dtype, device)


def _is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor, without importing what defines them."""
    cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(tensor, cls)


def _shards(weight: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of a projection that FSDP has sharded, sharded in the same way; every process has all scales."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    local = weight.to_local()
    local = local if local.dtype == torch.int8 else local.view(torch.float8_e4m3fn)
    rows = scale[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
    made = lowbit.dequantise(local, rows, dtype)
    return DTensor.from_local(made, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def _read(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Round the weights that are about to be loaded to 8 bits."""
    format = module.__dict__[BITS].format
    for name in PROJECTIONS:
        key, weight = prefix + name, module._parameters[name]
        given = state_dict.get(key)
        if not isinstance(given, Tensor) or given.shape != weight.shape:
            continue  # torch says so
        if _is_sharded(weight) or _is_sharded(given):
            error_msgs.append(f"{key}: cannot be rounded to 8 bits when it is sharded; load it before fully_shard.")
            state_dict[key] = weight
            continue
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            low, scale = lowbit.quantise(given.detach() if assign else given.detach().to(weight.device), format)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{key}: {error}")
            state_dict[key] = weight  # copied onto itself
            continue
        state_dict[key] = low if low.dtype == torch.int8 else low.view(torch.uint8)
        if assign:
            setattr(module, _SCALES[name], _scales(scale))
        else:
            rounded.rows_of(getattr(module, _SCALES[name])).copy_(scale)


def _progress(modules: Sequence[Any], what: str) -> Iterator[Any]:
    elements = sum(module._parameters[name].numel() for module in modules for name in PROJECTIONS)
    return iter(tqdm(modules, what, unit="layer", disable=elements < _LARGE))
