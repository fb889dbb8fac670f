"""The drop-in for transformers: `accelerate`, `restore`, and the experts implementation "omnigene_fast".

The experts are reached through transformers' own registry of experts implementations, Gemma-4's routers through an
instance attribute `forward`. Module classes, the module tree, hooks, parameters and state-dict keys stay as they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, activations
from transformers.integrations import moe

from .. import ops, reference
from ..backends import NAMES as BACKENDS

NAME = "omnigene_fast"
STOCK = "grouped_mm"  # what transformers chooses when nothing is asked for
_RECORD = "_omnigene_fast"  # instance attribute of every module that `accelerate` touched, except routers

Model = TypeVar("Model", bound=nn.Module)

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


@dataclasses.dataclass(frozen=True)
class _Record:
    """What `accelerate` asked of a module, and the experts implementation that its config named before."""

    backend: str
    implementation: str | None


_UNTOUCHED = _Record("auto", STOCK)


def accelerate(model: Model, *, numerics: str = "hf", backend: str = "auto") -> Model:
    """Run a transformers model's mixture-of-experts layers on this package's operators, in place.

    The experts of every layer are switched to the experts implementation "omnigene_fast"; Gemma-4's routers also get a
    fused forward. Module classes, hooks, parameters and state-dict keys do not change. Calling it again updates the
    options. The switch is made on the model's config object, as `model.set_experts_implementation` does: two models
    built from one config object switch together.

    Args:
        model: Gemma-4 (causal LM, conditional generation, or their inner models), bare, inside PEFT or torch.compile;
            of another family with transformers' gated experts (Qwen3-MoE, OLMoE, Mixtral) the experts only.
        numerics: how Gemma-4's router rounds: "hf" where transformers rounds, so that it routes as the stock model
            does; "fp32" keeps float32 to the end. Under autocast, and with a wrapped projection (LoRA, 4-bit), the
            projection rounds as that module does.
        backend: "auto", "cpu", "triton" or "reference"; an explicit one never falls back.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown option, no mixture-of-experts layer, or one that these operators cannot serve; the model
            is then left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if numerics not in reference.NUMERICS:
        raise ValueError(f"numerics: expected 'hf' or 'fp32', got {numerics!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    from . import gemma4  # imports the modelling code, which nobody pays for before they have a model

    experts = [module for module in model.modules() if _is_experts(module)]
    if not experts:
        raise ValueError(
            "model: expected a transformers model with mixture-of-experts layers,"
            f" got a {type(model).__name__} with none."
        )
    for module in experts:
        _activation(module)
        _check_weights(module, module.gate_up_proj)
    routers = [module for module in model.modules() if gemma4.is_router(module)]
    slots = [gemma4.forward_slot(router) for router in routers]

    # Every check is behind us: nothing below this line can fail half way.
    switched = [*experts, *_owners(model)]
    before = [_implementation_before(module) for module in switched]
    for module, implementation in zip(switched, before, strict=True):
        module.__dict__[_RECORD] = _Record(backend, implementation)
        _set_implementation(module, NAME)
    for router, slot in zip(routers, slots, strict=True):
        gemma4.install(router, slot, numerics=numerics, backend=backend)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: exactly the stock model again.

    A model that was loaded with `experts_implementation="omnigene_fast"` gets transformers' default, "grouped_mm". An
    experts implementation chosen after `accelerate` stays.

    Args:
        model: any module; one that was never accelerated is returned unchanged.

    Returns:
        `model` itself.
    """
    from . import gemma4

    for module in model.modules():
        gemma4.uninstall(module)
        record = module.__dict__.pop(_RECORD, None)
        if (record or _is_experts(module) or isinstance(module, PreTrainedModel)) and _implementation(module) == NAME:
            _set_implementation(module, (record or _UNTOUCHED).implementation)
    return model


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation "omnigene_fast": transformers calls it as the forward of an experts module.

    Args:
        self: an experts module of transformers, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
        hidden_states: [T, H], any floating dtype; computed in the dtype of the weights, as under autocast.
        top_k_index: [T, K] integer.
        top_k_weights: [T, K], any floating dtype.

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        ValueError: experts of another layout, with biases, or with an unknown activation.
    """
    activation = _activation(self)
    gate_up_proj = self.gate_up_proj
    _check_weights(self, gate_up_proj)
    dtype = gate_up_proj.dtype
    out = ops.expert_mlp(
        hidden_states if hidden_states.dtype == dtype else hidden_states.to(dtype),
        gate_up_proj,
        self.down_proj,
        top_k_index,
        top_k_weights,
        activation=activation,
        # transformers before this flag marked the picks of other ranks with id num_experts in any model.
        expert_parallel=getattr(self, "_is_expert_parallel", True),
        backend=self.__dict__.get(_RECORD, _UNTOUCHED).backend,
    )
    return out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _is_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class decorated with transformers' `use_experts_implementation`."""
    return hasattr(type(module), "_apply_gate") and "is_transposed" in module.__dict__


def _check_weights(experts: nn.Module, gate_up_proj: Any) -> None:
    if gate_up_proj.dtype not in ops.DTYPES:
        raise _refusal(experts, f"its gate_up_proj is stored as {gate_up_proj.dtype}")


def _activation(experts: Any) -> str:
    """The name of the experts' activation; ValueError if these operators cannot serve the module."""
    # From the activation object, never from the config: Gemma-4 has `hidden_activation` and no `hidden_act`.
    name = _ACTIVATIONS.get(type(getattr(experts, "act_fn", None)))
    if (
        name is not None
        and experts.has_gate
        and experts.is_concatenated
        and not experts.is_transposed
        and not experts.has_bias
        and not getattr(experts, "has_post_expert_norm", False)  # a later transformers than the oldest we serve
        and type(experts)._apply_gate is moe._default_apply_gate
        and "_apply_gate" not in experts.__dict__
    ):
        return name
    for refused, what in (
        (experts.has_bias, "its experts have biases"),
        (experts.is_transposed, "its expert weights are stored transposed"),
        (not experts.has_gate, "its experts have no gate"),
        (not experts.is_concatenated, "its gate and up rows are interleaved"),
        (getattr(experts, "has_post_expert_norm", False), "its experts end in a norm"),
        (name is not None, "it has a gate of its own (`_apply_gate`)"),
    ):
        if refused:
            raise _refusal(experts, what)
    raise _refusal(experts, f"its activation is {type(getattr(experts, 'act_fn', None)).__name__}")


def _refusal(experts: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"model: omnigene_fast cannot run {type(experts).__name__} because {what};"
        f' call model.set_experts_implementation("{STOCK}").'
    )


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers models in `model` that hold experts, and so whose config names their implementation."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(_is_experts(inner) for inner in module.modules()):
            yield module


def _implementation_before(module: Any) -> str | None:
    record = module.__dict__.get(_RECORD)
    if record is not None:
        return record.implementation
    current = _implementation(module)
    return STOCK if current == NAME else current


def _implementation(module: Any) -> str | None:
    implementation: str | None = module.config._experts_implementation
    return implementation


def _set_implementation(module: Any, implementation: str | None) -> None:
    # The property's setter would also write to sub-configs that have nothing to do with the experts.
    module.config._experts_implementation_internal = implementation
