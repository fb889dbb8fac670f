"""Forward and backward of the experts: what is trained, and who is measured.

    experts_frozen   gradients of hidden and top_k_weights: what a script needs whose experts are frozen
    experts_full     those of gate_up_proj and down_proj too
    experts_lora16   frozen experts with PEFT's LoRA of rank 16 on both projections: those of lora_A and lora_B
    experts_lora64   the same with rank 64

One call is a forward and a backward; the gradient of the output is `draw.hidden`. A provider returns "out" and one
gradient per input, by name. In the LoRA operations every provider runs under the same PEFT modules (`ParamWrapper`
around transformers' Gemma4TextExperts); only the experts implementation differs. Where PEFT is not installed, ours is
given the factors and the others a merged weight, made as PEFT makes it.
"""

import importlib.util
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
    """LoRA on both projections of a layer's experts, PEFT's if it is installed, shared by all providers."""

    experts: nn.Module  # nested ParamWrappers; without PEFT the bare experts
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
        if not uses_peft():
            return _patched(_without_peft(layer, adapter, name, backend), adapter.parameters, patch), lambda: None

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


def uses_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def _adapter(layer: Layer, rank: int) -> Adapter:
    experts = stock_experts(layer, "grouped_mm")
    factors, wrapped = _peft_factors(experts, rank) if uses_peft() else (_bare_factors(layer, rank), experts)
    generator = torch.Generator().manual_seed(rank)
    parameters: dict[str, nn.Parameter] = {}
    for name, weight in factors:
        # An update of a fraction of the weights; in values of the layer's dtype, to which PEFT casts them.
        spread = weight.shape[1] ** -0.5 if name.endswith("_A") else 2**-8
        drawn = torch.randn(weight.shape, generator=generator) * spread
        weight.data.copy_(drawn.to(layer.dtype))
        parameters[name] = weight
    return Adapter(wrapped, experts.config, parameters)


def _peft_factors(experts: Any, rank: int) -> tuple[list[tuple[str, nn.Parameter]], nn.Module]:
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.experts = experts
    lora = LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=[],
    )
    wrapped = get_peft_model(holder, lora).base_model.model.experts
    factors = []
    for module in wrapped.modules():
        if name := getattr(module, "parameter_name", None):
            for letter, factor in (("A", module.lora_A), ("B", module.lora_B)):
                factors.append((f"{name.removesuffix('_proj')}_{letter}", factor["default"].weight))
    return factors, wrapped


def _bare_factors(layer: Layer, rank: int) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the shapes that PEFT gives them."""
    factors = []
    for name, projection in (("down", layer.down), ("gate_up", layer.gate_up)):  # PEFT's outermost wrapper first
        E, rows, columns = projection.shape
        for letter, shape in (("A", (rank * E, columns)), ("B", (rows, rank * E))):
            factors.append((f"{name}_{letter}", nn.Parameter(torch.empty(shape, device=layer.device))))
    return factors


def _without_peft(layer: Layer, adapter: Adapter, name: str, backend: str) -> Forward:
    """The experts with the adapter's factors: given to our operator, or merged for transformers' module."""
    E = layer.shape.E

    def factors(projection: str) -> tuple[Tensor, Tensor]:
        rows, columns = adapter.parameters[f"{projection}_B"], adapter.parameters[f"{projection}_A"]
        lhs = rows.view(len(rows), -1, E).permute(2, 0, 1)  # [out, r * E], rank-major
        return (SCALING * lhs).to(layer.dtype), columns.view(E, -1, columns.shape[-1]).to(layer.dtype)

    if save := OURS_SAVE.get(name):

        def ours(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return ops.expert_mlp(
                hidden,
                layer.gate_up,
                layer.down,
                index,
                weights,
                activation="gelu_tanh",
                gate_up_lora=factors("gate_up"),
                down_lora=factors("down"),
                save=save,
                backend=backend,
            )

        return ours
    module = stock_experts(layer, STOCK[name])

    def merged(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        matrices = {
            f"{projection}_proj": torch.baddbmm(weight, *factors(projection))
            for projection, weight in (("gate_up", layer.gate_up), ("down", layer.down))
        }
        return torch.func.functional_call(module, matrices, (hidden, index, weights))

    return merged


def patched(call: Callable[[Draw], Any]) -> Callable[[Draw], Any]:
    """`call` with transformers' grouped_mm on its fallback."""

    def inner(draw: Draw) -> Any:
        with _fallback():
            return call(draw)

    return inner


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
