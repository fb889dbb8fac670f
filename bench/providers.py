"""Who is measured: omnigene_fast, its reference, transformers' own paths, and on a GPU the published kernels.

A provider computes an operation from a `Draw`; those with a backward are in `training.py`:

    route    (probabilities [T, E], weights [T, K], index [T, K]) of `draw.hidden`
    experts  [T, H] of `draw.normed`, `draw.index`, `draw.weights`
    block    [T, H]: router, pre-norm and experts of `draw.hidden`, the MoE branch of Gemma4TextDecoderLayer

and, where asked for by name, `experts_int8` and `experts_fp8` (see `lowbit.py`) and `route_traced`: the router, and its
decision written into buffers of a trace (ids in one byte, weights and statistics in half precision).

All providers of a layer share its weights' storage.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnigene_fast import ops, reference

from .lowbit import LOW_BIT_OPS, low_bit
from .training import (
    FALLBACK,
    OURS_SAVE,
    RANKS,
    STOCK,
    TRAINING_OPS,
    calls,
    eager_limit,
    patched,
    stock_experts,
    uses_peft,
)
from .workloads import EPS, Draw, Layer

FORWARD_OPS = ("route", "experts", "block")
OPS = (*FORWARD_OPS, *TRAINING_OPS)
ROUTES = ("route", "route_traced")
EXTRA_OPS = ("route_traced", *LOW_BIT_OPS)
OURS, OURS_INPUT = OURS_SAVE
REFERENCE = "reference"
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
GPU_ONLY = {
    "liger": "liger_kernel",
    "scattermoe": "scattermoe",
    "sonicmoe": "kernels",  # the PyPI package through which transformers loads sonic-moe
    "vllm": "vllm",
}
NAMES = (OURS, OURS_INPUT, *TRANSFORMERS, FALLBACK, *GPU_ONLY, REFERENCE)
# transformers copies gate_up and down once per (token, expert): 8 GB at 64 tokens of the true shape.
BATCHED_MM_MAX_TOKENS = 16

Output = Tensor | tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]


def _ignore(proj: Tensor) -> None:
    """Most providers of `experts` have no router."""


@dataclass
class Provider:
    """`call` is what is timed; `prepare` comes before each call, untimed, with a copy of the router's projection."""

    name: str
    call: Callable[[Draw], Output]
    prepare: Callable[[Tensor], None] = _ignore
    note: str = ""
    max_tokens: int | None = None
    skip_reason: str = ""
    wrong: str = ""  # why its result is known to be another, however close to the truth it may come in half precision

    def skipped(self, tokens: int) -> str | None:
        """Why this provider is not run on `tokens` tokens, or None."""
        return self.skip_reason if self.max_tokens is not None and tokens > self.max_tokens else None


@dataclass
class Missing:
    """A provider that was asked for and cannot run here."""

    name: str
    reason: str


@dataclass
class _Router:
    """The router's projection in use, swapped between calls."""

    proj: Tensor = field(default_factory=lambda: torch.empty(0))

    def use(self, proj: Tensor) -> None:
        self.proj = proj


def build(op: str, layer: Layer, names: tuple[str, ...] = NAMES, backend: str = "auto") -> list[Provider | Missing]:
    """The providers `names` of `op` on `layer`, in that order; those of the GPU are left out on a CPU.

    `route` has one provider of transformers, "eager" (its experts implementations share the router). The operations
    with a backward have ours in both memory modes, eager, grouped_mm and its fallback.
    """
    if op not in (*OPS, *EXTRA_OPS):
        raise ValueError(f"op: expected one of {', '.join((*OPS, *EXTRA_OPS))}, got {op!r}.")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"providers: expected some of {', '.join(NAMES)}, got {unknown[0]!r}.")
    built: list[Provider | Missing] = []
    for name in names:
        if op in TRAINING_OPS:
            if name in OURS_SAVE or name in STOCK:
                built.append(_training(op, layer, name, backend))
        elif op in LOW_BIT_OPS:
            built += _low_bit(op, layer, name, backend)
        elif name == OURS:
            built.append(_ours(op, layer, backend))
        elif name == REFERENCE:
            built.append(_reference(op, layer))
        elif name in TRANSFORMERS:
            if op not in ROUTES or name == "eager":
                built.append(_transformers(op, layer, name))
        elif op not in ROUTES and layer.device.type == "cuda":
            if name == FALLBACK:
                built.append(_fallback(op, layer))
            elif name in GPU_ONLY:
                built.append(_gpu(op, layer, name))
    return built


def _training(op: str, layer: Layer, name: str, backend: str) -> Provider:
    call, before = calls(op, layer, name, backend)
    provider = Provider(name, call, lambda proj: before())
    if op in RANKS and not uses_peft():
        provider.note = "PEFT is not installed: the merged weight is made as PEFT makes it"
    if name == "eager":
        provider.max_tokens = eager_limit(op, layer)
        provider.skip_reason = "fills a zero gradient of the whole layer for every expert that is hit: not run"
        if provider.max_tokens:
            provider.skip_reason += f" above {provider.max_tokens} tokens"
    return provider


def _ours(op: str, layer: Layer, backend: str) -> Provider:
    router, norm = _Router(), _stock_norm(layer)
    buffers = functools.cache(lambda tokens: trace_buffers(layer, tokens) if op == "route_traced" else None)

    def route(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        scales, trace = (layer.scale, layer.per_expert_scale), buffers(len(draw.hidden))
        return ops.route(draw.hidden, router.proj, *scales, top_k=layer.shape.K, eps=EPS, backend=backend, trace=trace)

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_mlp(
            hidden, layer.gate_up, layer.down, index, weights, activation="gelu_tanh", backend=backend
        )

    return _provider(op, OURS, route, norm, experts, router.use)


def trace_buffers(layer: Layer, tokens: int) -> ops.TraceBuffers:
    """Empty buffers for the decisions of `tokens` tokens."""
    kind = torch.uint8 if layer.shape.E <= 254 else torch.int16
    ids = torch.empty(tokens, layer.shape.K, dtype=kind, device=layer.device)
    weights = torch.empty(ids.shape, dtype=torch.float16, device=layer.device)
    return ops.TraceBuffers(ids, weights, weights.new_empty(tokens, 3))


def _low_bit(op: str, layer: Layer, name: str, backend: str) -> list[Provider | Missing]:
    """Ours and the reference on the 8 bits; the others on the weights that they stand for."""
    low = low_bit(layer, op)
    if name not in (OURS, REFERENCE):
        return [_noted(each, f"on {layer.dtype} weights") for each in build("experts", low.layer, (name,), backend)]

    def call(draw: Draw) -> Tensor:
        return ops.expert_mlp(
            draw.normed,
            low.gate_up,
            low.down,
            draw.index,
            draw.weights,
            activation="gelu_tanh",
            gate_up_scale=low.gate_up_scale,
            down_scale=low.down_scale,
            backend=backend if name == OURS else "reference",
        )

    return [Provider(name, call)]


def _noted(provider: Provider | Missing, note: str) -> Provider | Missing:
    if isinstance(provider, Provider):
        provider.note = f"{provider.note}; {note}" if provider.note else note
    return provider


def _fallback(op: str, layer: Layer) -> Provider:
    """transformers' grouped_mm without torch's."""
    provider = _transformers(op, layer, "grouped_mm")
    return dataclasses.replace(provider, name=FALLBACK, call=patched(provider.call))


def _reference(op: str, layer: Layer) -> Provider:
    router, norm = _Router(), _stock_norm(layer)

    def route(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        scales = (layer.scale, layer.per_expert_scale)
        return reference.route(draw.hidden, router.proj, *scales, top_k=layer.shape.K, eps=EPS)

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return reference.expert_mlp(hidden, layer.gate_up, layer.down, index, weights, activation="gelu_tanh")

    return _provider(op, REFERENCE, route, norm, experts, router.use)


def _transformers(op: str, layer: Layer, implementation: str) -> Provider:
    """The real Gemma4TextRouter, Gemma4RMSNorm and Gemma4TextExperts."""
    router, norm, experts = _stock_router(layer), _stock_norm(layer), stock_experts(layer, implementation)

    def prepare(proj: Tensor) -> None:
        router.proj.weight.data = proj

    buffers = functools.cache(lambda tokens: trace_buffers(layer, tokens))

    def route(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """With a trace: what a hook on the router can do, which sees neither entropy nor margin."""
        decision = router(draw.hidden)
        if op == "route_traced":
            ids, weights, _ = buffers(len(draw.hidden))
            ids.copy_(decision[2])
            if weights is not None:
                weights.copy_(decision[1])
        return decision

    provider = _provider(op, implementation, route, norm, experts, prepare)
    if implementation == "batched_mm":
        provider.max_tokens = BATCHED_MM_MAX_TOKENS
        provider.skip_reason = (
            f"copies the weights of every (token, expert): not run above {BATCHED_MM_MAX_TOKENS} tokens"
        )
    return provider


def _provider(
    op: str,
    name: str,
    route: Callable[[Draw], tuple[Tensor, Tensor, Tensor]],
    norm: Callable[[Tensor], Tensor],
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    prepare: Callable[[Tensor], None],
) -> Provider:
    def block(draw: Draw) -> Tensor:
        _, weights, index = route(draw)
        return experts(norm(draw.hidden), index, weights)

    by_op: dict[str, Callable[[Draw], Output]] = {
        "route": route,
        "route_traced": route,
        "experts": lambda draw: experts(draw.normed, draw.index, draw.weights),
        "block": block,
    }
    return Provider(name, by_op[op], prepare)


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it; a directory of that name is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent of a submodule
        return False
    return spec is not None and spec.origin is not None


def _gpu(op: str, layer: Layer, name: str) -> Provider | Missing:
    """A published GPU kernel for the experts, with the stock router and norm around it for `block`."""
    if not installed(GPU_ONLY[name]):
        return Missing(name, f"{GPU_ONLY[name]} is not installed")
    try:
        if name == "sonicmoe":
            # transformers reads config.hidden_act, which Gemma-4 does not have, and runs SwiGLU.
            provider = _transformers(op, layer, name)
            provider.note = "transformers' sonicmoe path runs SwiGLU on Gemma-4"
            return provider
        experts, note, wrong = {"liger": _liger, "scattermoe": _scattermoe, "vllm": _vllm}[name](layer)
    except Exception as error:  # an import of somebody else's compiled code can fail in any way
        return Missing(name, f"{type(error).__name__}: {error}")
    router = _stock_router(layer)

    def prepare(proj: Tensor) -> None:
        router.proj.weight.data = proj

    provider = _provider(op, name, lambda draw: router(draw.hidden), _stock_norm(layer), experts, prepare)
    provider.note, provider.wrong = note, wrong
    return provider


Peer = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str, str]  # its experts, a note, why it is known to be wrong


def _vllm(layer: Layer) -> Peer:
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    activation, wrong = "gelu", "vLLM's fused_experts here has GELU with erf, Gemma-4 the one with tanh"
    try:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        tanh = next((each for each in MoEActivation if each.value in ("gelu_tanh", "gelu_pytorch_tanh")), None)
        activation = tanh or MoEActivation("gelu")
        wrong = "" if tanh else wrong

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(hidden, layer.gate_up, layer.down, weights, index.int(), activation=activation)

    return experts, "", wrong


def _liger(layer: Layer) -> Peer:
    from liger_kernel.ops import LigerFusedMoEFunction  # type: ignore[import-not-found]

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(hidden, layer.gate_up, layer.down, index.int(), weights)

    return experts, "Liger's fused MoE has SwiGLU only", ""


def _scattermoe(layer: Layer) -> Peer:
    from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found]

    shape = layer.shape
    with torch.device("meta"):
        module = GLUMLP(shape.H, shape.I, shape.E, shape.K, activation=nn.GELU("tanh"))
    # Its order is up, then gate: a second copy of gate_up.
    module.experts.weight = _frozen(torch.cat([layer.gate_up[:, shape.I :], layer.gate_up[:, : shape.I]], dim=1))
    module.output_experts.weight = _frozen(layer.down)

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return module(hidden, weights.to(hidden.dtype), index)

    return experts, "needs its own copy of gate_up_proj", ""


def _stock_router(layer: Layer) -> Any:
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    shape = layer.shape
    config = Gemma4TextConfig(
        hidden_size=shape.H, num_experts=shape.E, top_k_experts=shape.K, rms_norm_eps=EPS, enable_moe_block=True
    )
    module = Gemma4TextRouter(config).to(layer.device, layer.dtype)
    module.scale, module.per_expert_scale = _frozen(layer.scale), _frozen(layer.per_expert_scale)
    return module.eval().requires_grad_(False)


def _stock_norm(layer: Layer) -> nn.Module:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    module = Gemma4RMSNorm(layer.shape.H, eps=EPS)
    module.weight = _frozen(layer.norm)
    return module.eval()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def truth_norm(layer: Layer, hidden: Tensor) -> Tensor:
    """Gemma4RMSNorm in the dtype of `hidden` (float64 for the truth)."""
    return F.rms_norm(hidden, (layer.shape.H,), layer.norm.to(hidden.dtype), EPS)
