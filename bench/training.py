"""Forward and backward of the experts: what is trained, and who is measured.

    experts_frozen   gradients of hidden and top_k_weights: what a script needs whose experts are frozen
    experts_full     those of gate_up_proj and down_proj too
    experts_lora16   frozen experts with PEFT's LoRA of rank 16 on both projections: those of lora_A and lora_B
    experts_lora64   the same with rank 64

One call is a forward and a backward; the gradient of the output is `draw.hidden`. A provider returns "out" and one
gradient per input, by name. In the LoRA operations every provider runs under the same PEFT modules (`ParamWrapper`
around transformers' Gemma4TextExperts); only the experts implementation differs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import omnigene_fast
from omnigene_fast import ops

from .workloads import Draw, Layer

TRAINING_OPS = ("experts_frozen", "experts_full", "experts_lora16", "experts_lora64")
RANKS = {"experts_lora16": 16, "experts_lora64": 64}
SCALING = 2.0  # lora_alpha / r, as in the paper's recipe (128 / 64)
OURS_SAVE = {"omnigene_fast": "preactivation", "omnigene_fast_input": "input"}
FALLBACK = "grouped_mm_fallback"
STOCK = {"eager": "eager", "grouped_mm": "grouped_mm", FALLBACK: "grouped_mm"}
# What the eager path of transformers may fill with zeros in one call: a layer for each expert that is hit.
EAGER_MAX_BYTES = 4 << 30

Gradients = dict[str, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Adapter:
    """PEFT's LoRA on both projections of a layer's experts, shared by all providers."""

    experts: nn.Module  # nested ParamWrappers
    config: Any  # of the Gemma4TextExperts inside: names the experts implementation
    parameters: dict[str, nn.Parameter]  # lora_A [r * E, in] expert-major, lora_B [out, r * E] rank-major, float32


def step(draw: Draw, forward: Forward, parameters: dict[str, Any]) -> Gradients:
    """The output and the gradients of hidden, weights and `parameters`, as "d_" and the name."""
    with torch.enable_grad():
        inputs: dict[str, Tensor] = {
            "hidden": draw.normed.detach().requires_grad_(),
            "weights": draw.weights.detach().requires_grad_(),
        }
        out = forward(inputs["hidden"], draw.index, inputs["weights"])
        inputs |= parameters
        grads = torch.autograd.grad(out, list(inputs.values()), draw.hidden)
    return {"out": out.detach()} | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def calls(op: str, layer: Layer, name: str, backend: str) -> tuple[Callable[[Draw], Gradients], Callable[[], None]]:
    """What is timed for provider `name`, and what has to be done before each call, untimed."""
    save, patch = OURS_SAVE.get(name), _fallback if name == FALLBACK else nullcontext
    if op in RANKS:
        adapter = adapted(layer, RANKS[op])

        def switch() -> None:
            omnigene_fast.restore(adapter.experts)
            if save:
                omnigene_fast.accelerate(adapter.experts, save=save, backend=backend)
            else:
                adapter.config._experts_implementation = STOCK[name]

        return _patched(adapter.experts, adapter.parameters, patch), switch
    trained = op == "experts_full"
    if save:
        gate_up, down = (weight.detach().requires_grad_(trained) for weight in (layer.gate_up, layer.down))

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return ops.expert_mlp(
                hidden, gate_up, down, index, weights, activation="gelu_tanh", save=save, backend=backend
            )

        return _patched(forward, {"gate_up": gate_up, "down": down} if trained else {}, patch), lambda: None
    module = stock_experts(layer, STOCK[name]).requires_grad_(trained)
    parameters = {"gate_up": module.gate_up_proj, "down": module.down_proj} if trained else {}
    return _patched(module, parameters, patch), lambda: None


def eager_limit(op: str, layer: Layer) -> int | None:
    """Tokens up to which transformers' eager path is run; None for no limit.

    Where the weights that it reads want a gradient, each `gate_up_proj[expert]` makes one of the whole layer.
    """
    experts = EAGER_MAX_BYTES // layer.shape.layer_bytes(layer.dtype)
    return None if op == "experts_frozen" or experts >= layer.shape.E else experts // layer.shape.K


def adapted(layer: Layer, rank: int) -> Adapter:
    """The layer's experts with PEFT's LoRA of `rank`, made once per layer."""
    if rank not in layer.adapters:
        layer.adapters[rank] = _adapter(layer, rank)
    return layer.adapters[rank]


def stock_experts(layer: Layer, implementation: str, experts: int | None = None) -> Any:
    """transformers' own Gemma4TextExperts on the layer's weights, or with `experts` of them and no weights yet."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    shape = layer.shape
    config = Gemma4TextConfig(
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        num_experts=experts or shape.E,
        top_k_experts=shape.K,
        enable_moe_block=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Gemma4TextExperts(config)
    if experts is None:
        module.gate_up_proj = nn.Parameter(layer.gate_up, requires_grad=False)
        module.down_proj = nn.Parameter(layer.down, requires_grad=False)
    return module.eval()


def _adapter(layer: Layer, rank: int) -> Adapter:
    from peft import LoraConfig, get_peft_model

    holder, experts = nn.Module(), stock_experts(layer, "grouped_mm")
    holder.experts = experts
    lora = LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=[],
    )
    wrapped = get_peft_model(holder, lora).base_model.model.experts
    generator = torch.Generator().manual_seed(rank)
    parameters: dict[str, nn.Parameter] = {}
    for module in wrapped.modules():
        if name := getattr(module, "parameter_name", None):
            for letter, factor in (("A", module.lora_A), ("B", module.lora_B)):
                weight = factor["default"].weight
                # An update of a fraction of the weights; in values of the layer's dtype, to which PEFT casts them.
                spread = weight.shape[1] ** -0.5 if letter == "A" else 2**-8
                drawn = torch.randn(weight.shape, generator=generator) * spread
                weight.data.copy_(drawn.to(layer.dtype))
                parameters[f"{name.removesuffix('_proj')}_{letter}"] = weight
    return Adapter(wrapped, experts.config, parameters)


def _patched(
    forward: Forward, parameters: dict[str, Any], patch: Callable[[], AbstractContextManager[None]]
) -> Callable[[Draw], Gradients]:
    def call(draw: Draw) -> Gradients:
        with patch():
            return step(draw, forward, parameters)

    return call


@contextmanager
def _fallback() -> Iterator[None]:
    """transformers' grouped_mm without torch's: what runs where `_can_use_grouped_mm` says no, as for the paper."""
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before
