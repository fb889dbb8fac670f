"""The drop-in for transformers: `accelerate` and `restore`.

The experts are reached through transformers' own registry of experts implementations (`experts.py`), Gemma-4's routers
(`gemma4.py`) and PEFT's wrappers around experts (`peft.py`) through an instance attribute `forward`. Module classes,
the module tree, hooks, parameters and state-dict keys stay as they are.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .. import ops, reference
from ..backends import NAMES as BACKENDS
from . import lowbit, peft
from .experts import NAME, RECORD, STOCK, UNTOUCHED, Record, activation_of, check_weights, implementation, is_experts

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    *,
    numerics: str = "hf",
    save: str = "preactivation",
    backend: str = "auto",
    experts_dtype: str | None = None,
    routers_only: bool = False,
) -> Model:
    """Run a transformers model's mixture-of-experts layers on this package's operators, in place.

    The experts of every layer are switched to the experts implementation "omnigene_fast"; Gemma-4's routers also get a
    fused forward. Both train: whatever requires a gradient gets one, and nothing else is computed. LoRA that PEFT puts
    on the experts' parameters (`target_parameters`), before or after this call, runs inside the operator, and the
    merged weights are never built. Module classes, hooks, parameters and state-dict keys do not change. Calling it
    again updates the options. The switch is made on the model's config object, as `model.set_experts_implementation`
    does: two models built from one config object switch together.

    Args:
        model: Gemma-4 (causal LM, conditional generation, or their inner models), bare, inside PEFT or torch.compile;
            of another family with transformers' gated experts (Qwen3-MoE, OLMoE, Mixtral) the experts only.
        numerics: how Gemma-4's router rounds: "hf" where transformers rounds, so that it routes as the stock model
            does; "fp32" keeps float32 to the end. Under autocast, and with a wrapped projection (LoRA, 4-bit), the
            projection rounds as that module does.
        save: what the experts of a layer keep for the backward. "preactivation" keeps their input and the output of
            gate_up_proj, "input" only their input, and computes the rest again: for the 26B-A4B in bfloat16 28,160
            against 5,632 bytes per token and layer, besides the routing (96 bytes). Under gradient checkpointing only
            one layer's are alive at a time.
        backend: "auto", "cpu", "triton" or "reference"; an explicit one never falls back.
        experts_dtype: None leaves the experts as they are stored; "int8" or "fp8" (e4m3) freezes them and stores them
            in 8 bits with a float32 scale per row: half the memory of bfloat16, at an error that "Experts in 8 bits"
            below describes. Of the 26B-A4B's text model that leaves 27.6 GB instead of 50.5: where only 27.6 fit, load
            it into main memory, call this, then `model.to("cuda")`.
        routers_only: True leaves the experts to transformers, for tools that look at the parts of an expert, and
            accelerates Gemma-4's routers alone; experts that an earlier call switched are switched back.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown option, no mixture-of-experts layer, or one that these operators cannot serve; weights
            that cannot be stored in 8 bits: not finite, of another quantisation, sharded, offloaded, shared, merged
            with an adapter, with a gradient, or in the other format; with `routers_only`, no router of Gemma-4, or
            experts in 8 bits. The model is then left as it was.

    Experts in 8 bits:
        The weight is float(stored) * scale of its row: int8 errs by at most half of amax / 127 of the row, fp8 by at
        most 1/16 of each value. In a small model (4 layers, 32 experts of which 8 are chosen) the logits move by 0.7 %
        with int8 and 2.2 % with fp8, and in the layers behind the first 2 % and 8 % of the tokens get another set of
        experts. The products are computed in the model's dtype, which
        `model.to(dtype)` still changes; the 8 bits and the scales stay. The experts require no gradient
        any more (`model.requires_grad_(True)` raises), so build the optimizer afterwards; LoRA on them trains, and its
        factors are float32 unless they were there before. Merging such an adapter brings the experts that it adapts
        back to the model's dtype. Other tools see weights: arithmetic reads float(stored) * scale, and what is written
        (EMA, merging, weight surgery) is rounded anew, row by row; rows that did not change keep their bits, and a part
        of a row cannot be written on its own. The dtype stays that of the bits, so an experts implementation that casts
        its input to it (grouped_mm) is refused; eager runs, slowly. Rounding needs, besides the
        model, the 8 bits of one layer and float32 copies of one expert; if memory runs out in between, the model runs
        as it is and a second call goes on.

        `state_dict`, and with it `save_pretrained`, writes what a stock model would write: the same keys, weights in
        the model's dtype. They are the rounded weights, float(stored) * scale, not those of the checkpoint that was
        loaded. They are built in main memory, all layers at once, as `state_dict` returns them together; this includes
        PEFT's `save_pretrained`, which asks for a whole state dict unless it is given one. `load_state_dict` rounds
        what it loads. Offloading by the accelerate library is refused, as it goes through the state dict.

        DDP and FSDP2 (`fully_shard`) take the 8 bits as any frozen parameter. With DDP's `broadcast_buffers=False` the
        scales are not sent in every step. Sharded by FSDP2, the state dict has the same shards in the model's dtype;
        `load_state_dict` and `restore` are refused, and its mixed precision does not change the dtype that the experts
        compute in.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if numerics not in reference.NUMERICS:
        raise ValueError(f"numerics: expected 'hf' or 'fp32', got {numerics!r}.")
    if save not in ops.SAVE:
        raise ValueError(f"save: expected 'preactivation' or 'input', got {save!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    from . import gemma4  # imports the modelling code, which nobody pays for before they have a model

    experts = [module for module in model.modules() if is_experts(module)]
    if not experts:
        raise ValueError(
            "model: expected a transformers model with mixture-of-experts layers,"
            f" got a {type(model).__name__} with none."
        )
    if routers_only:
        return _accelerate_routers(model, experts, numerics=numerics, backend=backend, experts_dtype=experts_dtype)
    for module in experts:
        activation_of(module)
    scales = {} if experts_dtype is None else lowbit.plan(model, experts, experts_dtype)
    for module in experts:
        check_weights(module, module.gate_up_proj, module.down_proj)
    routers = [module for module in model.modules() if gemma4.is_router(module)]
    slots = [gemma4.forward_slot(router) for router in routers]
    wrappers = [module for module in model.modules() if peft.is_wrapper(module)]

    # Every check is behind us: nothing below this line can fail half way (but memory can run out in `store`, which is
    # last and leaves a model that runs).
    gemma4.warn_of_quantised(routers)
    switched = [*experts, *_owners(model)]
    before = [_implementation_before(module) for module in switched]
    for module, name in zip(switched, before, strict=True):
        module.__dict__[RECORD] = Record(backend, save, name)
        _set_implementation(module, NAME)
    for router, slot in zip(routers, slots, strict=True):
        gemma4.install(router, slot, numerics=numerics, backend=backend)
    for wrapper in wrappers:
        peft.install(wrapper)
    peft.watch()
    if experts_dtype is not None:
        lowbit.store(scales, experts_dtype)
    return model


def _accelerate_routers(
    model: Model, experts: list[nn.Module], *, numerics: str, backend: str, experts_dtype: str | None
) -> Model:
    """`accelerate(model, routers_only=True)`: the experts as transformers runs them."""
    from . import gemma4

    routers = [module for module in model.modules() if gemma4.is_router(module)]
    if not routers:
        raise ValueError(
            f"routers_only: expected a model with routers of Gemma-4, got a {type(model).__name__} with none; call"
            " accelerate without it, which serves the experts."
        )
    if experts_dtype is not None:
        raise ValueError(
            f"routers_only: expected no experts_dtype beside it, got {experts_dtype!r}, which only this package's"
            " experts can run; leave one of the two out."
        )
    if any(lowbit.bits(module) is not None for module in experts):
        raise ValueError(
            "routers_only: expected experts in the model's dtype, got experts stored in 8 bits, which only this"
            " package's experts can run; call omnigene_fast.restore(model) first."
        )
    slots = [gemma4.forward_slot(router) for router in routers]
    gemma4.warn_of_quantised(routers)
    for module in model.modules():
        _release_experts(module)
    for router, slot in zip(routers, slots, strict=True):
        gemma4.install(router, slot, numerics=numerics, backend=backend)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: exactly the stock model again, but for weights that were rounded.

    A model that was loaded with `experts_implementation="omnigene_fast"` gets transformers' default, "grouped_mm". An
    experts implementation chosen after `accelerate` stays. Experts stored in 8 bits come back in the model's dtype with
    the rounding in them, as the log says; they require a gradient if they did before, unless the model has adapters of
    PEFT, which trains nothing else.

    Args:
        model: any module; one that was never accelerated is returned unchanged.

    Returns:
        `model` itself.
    """
    from . import gemma4

    lowbit.thaw_all(model.modules(), frozen=peft.has_adapters(model))
    for module in model.modules():
        gemma4.uninstall(module)
        _release_experts(module)
    return model


def _release_experts(module: nn.Module) -> None:
    """Undo what `accelerate` did to `module`, unless it is a router."""
    peft.uninstall(module)
    record = module.__dict__.pop(RECORD, None)
    if (record or is_experts(module) or isinstance(module, PreTrainedModel)) and implementation(module) == NAME:
        _set_implementation(module, (record or UNTOUCHED).implementation)


def served(model: nn.Module) -> tuple[int, int]:
    """How many of a model's Gemma-4 routers and experts modules run on this package's operators, and how many it has.

    After `accelerate` the two are equal (with `routers_only`, the first counts the routers), after `restore` the first
    is 0.
    """
    from . import gemma4

    each = [gemma4.is_accelerated(module) for module in model.modules() if gemma4.is_router(module)]
    each += [implementation(module) == NAME for module in model.modules() if is_experts(module)]
    return sum(each), len(each)


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers models in `model` that hold experts, and so whose config names their implementation."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(is_experts(inner) for inner in module.modules()):
            yield module


def _implementation_before(module: Any) -> str | None:
    record = module.__dict__.get(RECORD)
    if record is not None:
        return record.implementation
    current = implementation(module)
    return STOCK if current == NAME else current


def _set_implementation(module: Any, name: str | None) -> None:
    # The property's setter would also write to sub-configs that have nothing to do with the experts.
    module.config._experts_implementation_internal = name
