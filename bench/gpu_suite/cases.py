"""What is measured, in the order in which it matters: (operation, routing, T)."""

import torch

from ..floors import Probe
from ..runner import Settings
from ..training import TRAINING_OPS
from ..workloads import TRUE_SHAPE, Shape

Case = tuple[str, str, int]
FORWARD_TOKENS = (1, 8, 64, 512, 4096, 16384)
GATE_TOKENS = (1, 256, 16384)
LOW_BIT_TOKENS = (1, 8, 64, 512, 4096)
DECODE_TOKENS = (1, 8, 16)
SKEWED = ("protein", "natural")
# E : K and H : I as in Gemma-4, everything else a quarter or less.
SMALL_SHAPE = Shape(H=704, I=176, E=64, K=4)
TINY_SHAPE = Shape(H=64, I=16, E=16, K=2)
TINY_TOKENS = {1: 1, 8: 2, 16: 3, 64: 4, 256: 5, 512: 8, 4096: 16, 16384: 24}


def table() -> list[Case]:
    """The benchmark's cases."""
    cases: list[Case] = [("experts", "uniform", tokens) for tokens in FORWARD_TOKENS]
    cases += [("experts_frozen", "uniform", 4096), ("experts_full", "uniform", 16384)]
    cases += [(op, "uniform", tokens) for tokens in GATE_TOKENS for op in ("route", "route_traced")]
    cases += [("experts", "protein", tokens) for tokens in FORWARD_TOKENS]
    cases += [("experts_lora16", "uniform", 4096), ("block", "uniform", 1), ("block", "uniform", 4096)]
    cases += [(op, "uniform", tokens) for tokens in LOW_BIT_TOKENS for op in ("experts_int8", "experts_fp8")]
    cases += [("experts_frozen", "protein", 4096), ("experts_full", "protein", 16384)]
    cases += [("experts", "natural", tokens) for tokens in FORWARD_TOKENS]
    cases += [("experts_frozen", "natural", 4096), ("experts_full", "natural", 16384)]
    cases += [("experts_lora16", "protein", 4096), ("experts_lora64", "uniform", 4096)]
    cases += [("experts_frozen", "uniform", 16384), ("experts_full", "uniform", 4096), ("block", "uniform", 512)]
    return cases


def decode() -> list[Case]:
    """Those under CUDA graphs with rotating weights."""
    return [("decode", "uniform", tokens) for tokens in DECODE_TOKENS] + [("decode", "protein", 8)]


def tokens_of(tokens: int, tiny: bool) -> int:
    """T, or what stands for it in the tiny suite."""
    return TINY_TOKENS[tokens] if tiny else tokens


def shape_of(tiny: bool) -> Shape:
    """The layer that is measured."""
    return TINY_SHAPE if tiny else TRUE_SHAPE


class _SampledOnce(Probe):
    """For the tiny suite: a sample reads a GiB, and no figure of that suite says anything of the machine."""

    def sample(self) -> None:
        """Measure once, in the first call."""
        if not self.bandwidths:
            super().sample()

    def reset(self) -> None:
        """Keep it."""


def probe_of(device: torch.device, tiny: bool) -> Probe:
    """What a step measures the machine with."""
    return (_SampledOnce if tiny else Probe)(device, torch.bfloat16)


def settings_of(case: Case, device: torch.device, tiny: bool) -> Settings:
    """The runner's settings for one case: on a GPU a call takes milliseconds, so a second goes a long way."""
    op, mode, tokens = case
    tokens = tokens_of(tokens, tiny)
    long = op in TRAINING_OPS or tokens > 4096
    return Settings(
        ops=(op,),
        tokens=(tokens,),
        modes=(mode,),
        training_tokens=(tokens,),
        training_modes=(mode,),
        device=device,
        shape=shape_of(tiny),
        seconds=0.0 if tiny else 1.0 if long else 0.6,
        min_rounds=3 if tiny else 7,
        max_rounds=3 if tiny else 60,
        draws=2 if tiny or tokens > 4096 else 4,
    )
