"""Tiny models, routings and error measures that the tests share. Dimensions as in `omnigene_fast.reference`."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextRouter

from omnigene_fast import backends, reference

FLOOR = 1e-6
ROUTINGS = ("uniform", "language", "protein")
HIDDEN, EXPERTS, TOP_K, VOCAB = 64, 8, 3, 300


def backend_params() -> list:
    """Every backend that runs CPU tensors, as pytest parameters; a missing one is skipped with its own reason."""
    params = [pytest.param("reference")]
    try:
        reason = backends.load("cpu").unavailable(torch.device("cpu"))
    except ModuleNotFoundError as error:
        reason = str(error)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return [*params, pytest.param("cpu", marks=marks)]


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; infinite if `out` is not finite."""
    out, truth = out.double(), truth.double()
    assert out.shape == truth.shape, f"shape {list(out.shape)}, expected {list(truth.shape)}"
    if not out.isfinite().all():
        return math.inf
    norm = truth.norm().item()
    return (out - truth).norm().item() / norm if norm else (out - truth).norm().item()


def assert_as_accurate(out: Tensor, stock: Tensor, truth: Tensor, what: str = "") -> None:
    """The criterion of every parity test: at most twice the error that transformers has in the same dtype."""
    ours, theirs = relative_error(out, truth), relative_error(stock, truth)
    assert ours <= 2 * theirs + FLOOR, f"{what}: relative error {ours:.3e}, transformers' own {theirs:.3e}"


def assert_same(out: Tensor, expected: Tensor, backend: str) -> None:
    """Bit-equal from our kernels; to rounding from the reference, where torch's own products look at the layout."""
    tolerance = 2 * torch.finfo(expected.dtype).eps if backend == "reference" and expected.is_floating_point() else 0
    assert relative_error(out, expected) <= tolerance


def routing(mode: str, T: int, K: int, E: int, seed: int) -> tuple[Tensor, Tensor]:
    """Index [T, K] int64 with distinct experts in each row, and weights [T, K] float32 that sum to about one.

    uniform: every expert as likely; language: exp(entropy) of the load is 62/128 of E, as for natural language;
    protein: three experts take 99.9 % of the tokens each, as for protein text.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(E)
    if mode == "language":
        logits = torch.randn(E, generator=generator) * math.sqrt(2 * math.log(128 / 62))
    scores = logits - torch.empty(T, E).exponential_(generator=generator).log()  # Gumbel noise: top-k is a draw
    if mode == "protein":
        giants = torch.randperm(E, generator=generator)[:3]
        scores[:, giants] += 100 * (torch.rand(T, giants.numel(), generator=generator) < 0.999)
    top = scores.topk(K, dim=-1)
    return top.indices, torch.softmax(torch.randn(T, K, generator=generator), dim=-1)


def text_config(**changes):
    """A Gemma-4 with 3 layers (sliding, sliding, full attention), 8 experts of which 3 are chosen, and H != I."""
    options = {
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "max_position_embeddings": 256,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": 40,
        "initializer_range": 0.25,  # large enough for the experts to matter and the router to have preferences
    }
    return transformers.Gemma4TextConfig(**(options | changes))


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give scales and norms, which start as ones, values that a mistake would show up in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            assert parameter.isfinite().all(), name
    return model.eval()


def gemma4(dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A tiny random `Gemma4ForCausalLM` in eval mode."""
    torch.manual_seed(seed)
    return randomize(transformers.Gemma4ForCausalLM(text_config(**changes))).to(dtype)


def gemma4_conditional(dtype: torch.dtype = torch.float32, seed: int = 0):
    """A tiny random `Gemma4ForConditionalGeneration` with a vision tower and no audio tower."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
    }
    config = transformers.Gemma4Config(text_config=text_config().to_dict(), vision_config=vision, audio_config=None)
    return randomize(transformers.Gemma4ForConditionalGeneration(config)).to(dtype)


_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}


def qwen3_moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **_SHARED, intermediate_size=96, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=3, head_dim=16
    )
    return randomize(transformers.Qwen3MoeForCausalLM(config))


def olmoe():
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**_SHARED, intermediate_size=40, num_experts=8, num_experts_per_tok=3)
    return randomize(transformers.OlmoeForCausalLM(config))


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**_SHARED, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2)
    return randomize(transformers.MixtralForCausalLM(config))


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **_SHARED, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2, head_dim=16
    )
    return transformers.GptOssForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def moe_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers that hold a Gemma-4 router, wherever the model keeps them."""
    return [module for module in model.modules() if "router" in module._modules and "experts" in module._modules]


def stock_experts(
    E: int, H: int, intermediate: int, dtype: torch.dtype, seed: int = 0, activation: str = "gelu_pytorch_tanh"
) -> Gemma4TextExperts:
    """transformers' own experts on its eager path, gate pre-activations of magnitude ~1 for hidden states of ~1."""
    config = text_config(num_experts=E, hidden_size=H, moe_intermediate_size=intermediate, hidden_activation=activation)
    config._experts_implementation = "eager"
    experts = Gemma4TextExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    experts.gate_up_proj.copy_(torch.randn(E, 2 * intermediate, H, generator=generator) / math.sqrt(H))
    experts.down_proj.copy_(torch.randn(E, H, intermediate, generator=generator) / math.sqrt(intermediate))
    return experts.to(dtype)


def stock_router(E: int, K: int, H: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Gemma4TextRouter:
    """transformers' own router; `spread` scales the logits."""
    router = Gemma4TextRouter(text_config(num_experts=E, top_k_experts=K, hidden_size=H)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    router.proj.weight.copy_(torch.randn(E, H, generator=generator) * spread)
    router.scale.copy_(0.7 + 0.6 * torch.rand(H, generator=generator))
    router.per_expert_scale.copy_(0.7 + 0.6 * torch.rand(E, generator=generator))
    return router.to(dtype)


def experts_truth(experts: Gemma4TextExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What `experts` should give, in float64, by the reference."""
    return reference.expert_mlp(
        hidden.double(),
        experts.gate_up_proj.double(),
        experts.down_proj.double(),
        index,
        weights.double(),
        activation="gelu_tanh",
    )


def router_arguments(router: Gemma4TextRouter, dtype: torch.dtype | None = None) -> dict:
    """The keyword arguments of `ops.route` and `reference.route` for a stock router."""
    parameters = {
        "proj_weight": router.proj.weight,
        "scale": router.scale,
        "per_expert_scale": router.per_expert_scale,
    }
    if dtype is not None:
        parameters = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    return parameters | {"top_k": router.config.top_k_experts, "eps": router.eps}


@contextlib.contextmanager
def experts_implementation(model: torch.nn.Module, name: str):
    """Run `model` with another experts implementation, then put the present one back."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(name)
    try:
        yield model
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """A list that holds the bytes of every CPU allocation torch makes in the block, once the block is left."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield sizes
    events = recorded.profiler.kineto_results.events()
    sizes += [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
