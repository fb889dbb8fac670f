"""The experts implementation "omnigene_fast" of transformers: what runs as the forward of an experts module."""

import dataclasses
import functools
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import activations
from transformers.integrations import moe

from .. import ops
from . import lowbit
from .bound import is_unhooked

logger = logging.getLogger("omnigene_fast")

NAME = "omnigene_fast"
STOCK = "grouped_mm"  # what transformers chooses when nothing is asked for
RECORD = "_omnigene_fast"  # instance attribute of every module that `accelerate` touched, except routers

Factors = tuple[Tensor, Tensor]  # lhs [E, out, r] with the scaling in it, rhs [E, r, in]: the weight is W + lhs @ rhs

# By exact class, because a subclass may compute something else. The three long spellings of the tanh form are the same
# function; their constants agree to 1e-11.
_ACTIVATIONS: dict[type, str] = {
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUActivation: "gelu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
}
_PLAIN = (nn.Parameter, Tensor)
_SHORT_INTEGERS = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32)
_FUNCTIONS = {nn.functional.silu: "silu"}  # LFM2-MoE's experts hold the function


@dataclasses.dataclass(frozen=True)
class Record:
    """What `accelerate` asked of a module, and the experts implementation that its config named before."""

    backend: str
    save: str
    implementation: str | None


UNTOUCHED = Record("auto", "preactivation", STOCK)


def experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Mapping[str, Sequence[Factors]] | None = None,
) -> Tensor:
    """The experts implementation "omnigene_fast": transformers calls it as the forward of an experts module.

    Args:
        self: an experts module of transformers, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
        hidden_states: [T, H], any floating dtype; computed in the dtype of the weights, as under autocast, or in
            that of the model where the weights are stored in 8 bits.
        top_k_index: [T, K] integer.
        top_k_weights: [T, K], any floating dtype, integer or bool.
        lora: low-rank updates by the name of their parameter, as `integrations.peft` hands them down.

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        ValueError: experts of another layout, with biases, or with an unknown activation; stored in 8 bits and then
            offloaded.
    """
    activation = activation_of(self)
    if is_watched(self):
        return _stock_forward(self, hidden_states, top_k_index, top_k_weights)
    gate_up_proj, gate_up_lora = _projection(self, "gate_up_proj", lora)
    down_proj, down_lora = _projection(self, "down_proj", lora)
    if top_k_index.dtype in _SHORT_INTEGERS:  # a hook on the router may return what transformers' kernels take
        top_k_index = top_k_index.long()
    if not top_k_weights.dtype.is_floating_point:  # 0 and 1, or whether
        top_k_weights = top_k_weights.float()
    record = self.__dict__.get(RECORD, UNTOUCHED)
    gate_up_scale = down_scale = None
    if lowbit.bits(self) is None:
        check_weights(self, gate_up_proj, down_proj)
        dtype = gate_up_proj.dtype
    else:
        lowbit.check_not_offloaded(self)
        dtype = lowbit.compute_dtype(self)
        gate_up_proj, gate_up_scale = lowbit.stored(self, "gate_up_proj")
        down_proj, down_scale = lowbit.stored(self, "down_proj")
    out = ops.expert_mlp(
        hidden_states if hidden_states.dtype == dtype else hidden_states.to(dtype),
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        activation=activation,
        gate_up_lora=gate_up_lora,
        down_lora=down_lora,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        # transformers before this flag marked the picks of other ranks with id num_experts in any model.
        expert_parallel=getattr(self, "_is_expert_parallel", True),
        save=record.save,
        backend=record.backend,
    )
    return out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def is_watched(experts: Any) -> bool:
    """Whether another tool has hooked the experts' activation, of which the fused forward has no call."""
    act_fn = experts._modules.get("act_fn")
    return act_fn is not None and not is_unhooked(act_fn)


def _stock_forward(experts: Any, *arguments: Tensor) -> Tensor:
    """The experts implementation from before `accelerate`, which calls the activation as a module."""
    if lowbit.bits(experts) is not None:
        raise _refusal(experts, "its act_fn has hooks, and only the fused forward reads 8 bits", "remove the hooks")
    name = experts.__dict__.get(RECORD, UNTOUCHED).implementation or STOCK
    _say_that_hooks_are_slow(type(experts).__name__, name)
    run = moe.ALL_EXPERTS_FUNCTIONS.get_interface(name, type(experts).forward.__wrapped__)
    out: Tensor = run(experts, *arguments)
    return out


@functools.cache
def _say_that_hooks_are_slow(kind: str, name: str) -> None:
    logger.warning("%s with hooks on act_fn runs as %r of transformers, which calls them and is slower.", kind, name)


def _projection(experts: Any, name: str, lora: Mapping[str, Sequence[Factors]] | None) -> tuple[Tensor, Factors | None]:
    """A weight of the experts and its low-rank update, of all adapters together."""
    pairs = list(lora.get(name, ())) if lora else []
    weight = None
    if "parametrizations" in experts._modules and name in experts.parametrizations:
        steps = experts.parametrizations[name]
        # A LoRA wrapper that runs PEFT's own way leaves its factors here; reading the attribute would build the sum.
        if all(hasattr(step, "lhs") and hasattr(step, "rhs") and hasattr(step, "scaling") for step in steps):
            weight = steps.original
            pairs += [(scaled(step.lhs, step.scaling), step.rhs) for step in steps]
    if weight is None:
        weight = getattr(experts, name) if lowbit.bits(experts) is None else lowbit.codes(experts, name)
    if not pairs:
        return weight, None
    if len(pairs) == 1:
        return weight, pairs[0]
    return weight, (torch.cat([lhs for lhs, _ in pairs], dim=2), torch.cat([rhs for _, rhs in pairs], dim=1))


def scaled(lhs: Tensor, scaling: float) -> Tensor:
    """`lhs` [E, out, r] times `scaling`, contiguous."""
    # PEFT keeps it as [out, r, E]: flattened, the copy is one transposition of a matrix, which torch does in blocks.
    packed = lhs.flatten(1).contiguous().view(lhs.shape)
    return packed if scaling == 1 else packed * scaling


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class decorated with transformers' `use_experts_implementation`."""
    return hasattr(type(module), "_apply_gate") and "is_transposed" in module.__dict__


def implementation(module: Any) -> str | None:
    """The experts implementation that the config of `module` names."""
    name: str | None = module.config._experts_implementation
    return name


def check_weights(experts: nn.Module, *weights: Any) -> None:
    """ValueError if the experts are stored in what these operators cannot compute in: a dtype, or another tool's
    tensors, which look like floating ones (torchao)."""
    if lowbit.bits(experts) is not None:
        return
    for name, weight in zip(lowbit.PROJECTIONS, weights, strict=False):
        if is_packed(weight):
            raise _refusal(experts, f"its {name} is a {type(weight).__name__}, which another tool quantises or packs")
        if weight.dtype not in ops.DTYPES:
            raise _refusal(experts, f"its {name} is stored as {weight.dtype}")


def is_packed(weight: Any) -> bool:
    """Whether `weight` is a tensor of another tool, which may look like a floating one (torchao)."""
    kind = type(weight)
    return kind not in _PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _is_known(kind)


def _is_known(kind: type) -> bool:
    """Whether torch turns tensors of this class into plain ones before these operators see them."""
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return issubclass(kind, FakeTensor) or (sharded is not None and issubclass(kind, sharded))


def activation_of(experts: Any) -> str:
    """The name of the experts' activation; ValueError if these operators cannot serve the module."""
    # From the activation object, never from the config: Gemma-4 has `hidden_activation` and no `hidden_act`.
    act_fn = getattr(experts, "act_fn", None)
    name = _FUNCTIONS.get(act_fn) if inspect.isroutine(act_fn) else _ACTIVATIONS.get(type(act_fn))
    own_gate = type(experts)._apply_gate is not moe._default_apply_gate or "_apply_gate" in experts.__dict__
    if (
        name is not None
        and experts.has_gate
        and experts.is_concatenated
        and not experts.is_transposed
        and not experts.has_bias
        and not getattr(experts, "has_post_expert_norm", False)  # a later transformers than the oldest we serve
        and not own_gate
    ):
        return name
    for refused, what in (
        (experts.has_bias, "its experts have biases"),
        (experts.is_transposed, "its expert weights are stored transposed"),
        (not experts.has_gate, "its experts have no gate"),
        (not experts.is_concatenated, "its gate and up rows are interleaved"),
        (getattr(experts, "has_post_expert_norm", False), "its experts end in a norm"),
        (own_gate, "it has a gate of its own (`_apply_gate`)"),
    ):
        if refused:
            raise _refusal(experts, what)
    raise _refusal(experts, f"its activation is {getattr(act_fn, '__name__', type(act_fn).__name__)}")


def _refusal(
    experts: nn.Module, what: str, way_out: str = f'call model.set_experts_implementation("{STOCK}")'
) -> ValueError:
    return ValueError(f"model: omnigene_fast cannot run {type(experts).__name__} because {what}; {way_out}.")
