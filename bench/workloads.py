"""What is measured: a layer's shape and weights, and the routing modes.

A routing mode is a bias per expert added to N(0, 1) logits; a token visits the K largest. Biases are calibrated on a
fixed sample, so that the modes have these statistics (E = 128, K = 8):

    uniform   every expert equally likely, 128 effective experts
    natural   62 effective experts, as natural language in Gemma-4
    protein   three experts each take 99.9 % of the tokens, the other five picks spread: 12.6 effective experts, as
              protein sequences

Effective experts are exp(entropy in nats) of the experts' share of all picks.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODES = ("uniform", "natural", "protein")
EFFECTIVE = {"natural": 62 / 128, "protein": 12.6 / 128}  # of E
GIANTS, GIANT_SHARE = 3, 0.999
EPS = 1e-6  # rms_norm_eps of Gemma-4
# Where a bf16 logit may be off by an ulp, the 8th expert is not defined: checked tokens keep this distance (logits).
MARGIN = 0.06
ALONG = 0.5  # cosine between a hidden state and the direction that carries the biases
ACROSS = (1 - ALONG**2) ** 0.5
LOWEST = -5.0  # bias of an expert that is hardly ever visited; bounded, so that bf16 logits stay fine-grained
_CALIBRATION_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    """H hidden size, I intermediate size of an expert, E experts, K experts per token."""

    H: int = 2816
    I: int = 704  # noqa: E741
    E: int = 128
    K: int = 8

    def __post_init__(self) -> None:
        if min(self.H, self.I, self.E, self.K) < 1 or self.K > self.E:
            raise ValueError(f"shape: expected H, I, E, K >= 1 and K <= E, got {self.H},{self.I},{self.E},{self.K}.")

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert's three matrices."""
        return 3 * self.H * self.I * dtype.itemsize

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all experts."""
        return self.E * self.expert_bytes(dtype)


TRUE_SHAPE = Shape()  # one layer of Gemma-4-26B-A4B: 1.52 GB in bfloat16


@dataclass(frozen=True)
class Draw:
    """One call's inputs; every provider sees the same draws, in another order."""

    hidden: Tensor  # [T, H], the residual; where a backward is measured, the gradient of the output
    normed: Tensor  # [T, H], what the experts read
    index: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float32


class Layer:
    """Random weights of one MoE layer, made in about two seconds per 1.5 GB.

    Attributes:
        gate_up: [E, 2I, H]; down: [E, H, I]; values in ±[2⁻⁷, 2⁻⁵) so that gate pre-activations are of order one.
        noise: [E, H] float32, the part of the router's projection that does not depend on the routing mode.
        direction: [H] float32 unit vector along which every hidden state carries the mode's biases.
        scale, norm: [H]; per_expert_scale: [E].
        adapters: LoRA modules on these weights by rank, made by `training.adapted` when first asked for.
        low_bits: these weights in 8 bits by operation, made by `lowbit.low_bit` when first asked for.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.adapters: dict[int, Any] = {}
        self.low_bits: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(seed)
        self.gate_up = torch.empty(shape.E, 2 * shape.I, shape.H, dtype=dtype, device=device)
        self.down = torch.empty(shape.E, shape.H, shape.I, dtype=dtype, device=device)
        rng = np.random.Generator(np.random.SFC64(seed))
        on_device = torch.Generator(device).manual_seed(seed)
        for weight in (self.gate_up, self.down):
            for expert in range(shape.E):
                if device.type == "cuda":
                    weight[expert] = random_on_device(weight[expert].shape, on_device)
                else:
                    weight[expert] = cheap_random(rng, weight[expert].numel()).view(weight[expert].shape)
        direction = torch.randn(shape.H, generator=generator)
        self.direction = direction / direction.norm()
        self.noise = torch.randn(shape.E, shape.H, generator=generator)
        self.scale = torch.ones(shape.H, dtype=dtype, device=device)
        self.norm = (1 + 0.1 * torch.randn(shape.H, generator=generator)).to(device, dtype)
        self.per_expert_scale = (1 + 0.1 * torch.randn(shape.E, generator=generator)).to(device, dtype)

    def projection(self, mode: str) -> Tensor:
        """The router's projection [E, H] that routes `draws(mode, ...)` as the mode says.

        A hidden state is noise plus a constant direction; along it the projection carries the mode's biases.
        """
        noise = self.noise - torch.outer(self.noise @ self.direction, self.direction)
        bias = routing_bias(mode, self.shape.E, self.shape.K)
        return (noise / ACROSS + torch.outer(bias / ALONG, self.direction)).to(self.device, self.dtype)

    def draws(self, mode: str, tokens: int, count: int, seed: int = 1) -> Iterator[Draw]:
        """`count` calls' inputs of `tokens` tokens each, the routing redrawn for each; the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)  # on a GPU, 16384 tokens take the host seconds
        proj = self.projection(mode).float()
        for _ in range(count):
            logits, hidden = self._tokens(proj, tokens, generator)
            top, index = logits.topk(self.shape.K, dim=-1)
            normed = torch.randn(tokens, self.shape.H, generator=generator, device=self.device)
            yield Draw(hidden.to(self.dtype), normed.to(self.dtype), index, top.softmax(-1))

    def _tokens(self, proj: Tensor, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits [T, E] and hidden states [T, H] of tokens whose 8th and 9th logits are `MARGIN` apart."""
        shape, kept = self.shape, []
        direction = self.direction.to(self.device)
        missing = tokens
        while missing:
            noise = torch.randn(2 * missing + 8, shape.H, generator=generator, device=self.device)
            noise -= torch.outer(noise @ direction, direction)
            noise /= noise.norm(dim=-1, keepdim=True)
            unit = ACROSS * noise + ALONG * direction
            hidden = (unit * shape.H**0.5 * 2).to(self.dtype).float()
            logits = torch.nn.functional.linear(hidden / hidden.norm(dim=-1, keepdim=True), proj)
            if shape.K < shape.E:
                top = logits.topk(shape.K + 1, dim=-1).values
                clear = top[:, -2] - top[:, -1] > MARGIN
                logits, hidden = logits[clear], hidden[clear]
            kept.append((logits[:missing], hidden[:missing]))
            missing -= len(kept[-1][0])
        return torch.cat([logits for logits, _ in kept]), torch.cat([hidden for _, hidden in kept])


def cheap_random(rng: np.random.Generator, count: int) -> Tensor:
    """[count] bfloat16 of random sign, mantissa and one exponent bit, ±[2⁻⁷, 2⁻⁵): four values per 64 random bits."""
    words = rng.integers(0, 2**64, size=-(-count // 4), dtype=np.uint64)
    words &= np.uint64(0x80FF_80FF_80FF_80FF)
    words |= np.uint64(0x3C00_3C00_3C00_3C00)  # biased exponents 120 and 121
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)[:count]


def random_on_device(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The same kind of numbers made on the generator's device: other bits, in a hundredth of the time on a GPU."""
    words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator, device=generator.device)
    return words.bitwise_and_(0x80FF - 2**16).bitwise_or_(0x3C00).view(torch.bfloat16)


@functools.cache
def routing_bias(mode: str, E: int, K: int) -> Tensor:
    """The bias per expert [E] that gives N(0, 1) logits the statistics of `mode`."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "uniform" or E <= K:
        return torch.zeros(E)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(_CALIBRATION_TOKENS, E, generator=generator)
    order = torch.randperm(E, generator=generator)
    steps = torch.linspace(0, -1, E)[order]
    giants = order[:GIANTS] if mode == "protein" and K > GIANTS else order[:0]

    def at_spread(spread: float) -> Tensor:
        bias = (spread * steps).clamp_min(LOWEST)
        bias[giants] = -2 * LOWEST
        return bias

    def concentration(spread: float) -> float:
        return -effective_experts(_picks(noise, at_spread(spread), K))

    steepest = -LOWEST * (E - 1) / K  # beyond it fewer than K experts are above the lowest
    bias = at_spread(_bisect(concentration, -EFFECTIVE[mode] * E, steepest))
    for giant in giants.tolist():

        def share(offset: float, giant: int = giant) -> float:
            bias[giant] = offset
            return (_picks(noise, bias, K) == giant).any(-1).double().mean().item()

        bias[giant] = _bisect(share, GIANT_SHARE, -2 * LOWEST)
    return bias


def effective_experts(index: Tensor) -> float:
    """exp(entropy in nats) of the experts' share of the picks `index` [T, K]."""
    share = torch.bincount(index.flatten()).double()
    share = share[share > 0] / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def _picks(noise: Tensor, bias: Tensor, K: int) -> Tensor:
    return (noise + bias).topk(K, dim=-1).indices


def _bisect(rising: Callable[[float], float], target: float, high: float) -> float:
    low = 0.0
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high
