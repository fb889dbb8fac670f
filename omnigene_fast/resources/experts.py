"""The launches of the experts' kernels at Gemma-4's sizes: every tile that the tables can choose, in every role."""

import torch
from torch import Tensor

from ..backends import PLAIN, Scales
from ..kernels import tiles
from ..kernels.combine import launch_combine_fwd
from ..kernels.dispatch import launch_dispatch_fwd
from ..kernels.expert_backward import launch_expert_down_bwd
from ..kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
from ..kernels.grouped_gemm import LowRank, launch_grouped_gemm, launch_grouped_gram
from ..kernels.lora import (
    LoraFactors,
    launch_lora_bwd,
    launch_lora_fwd,
    launch_lora_lhs_bwd,
    launch_lora_rhs_bwd,
    pad_factors,
)
from ..kernels.weights import CONVERTS_E4M3, tiles_of_8_bits
from .recorder import Recorder

E, K, H, I = 128, 8, 2816, 704  # noqa: E741
TOKENS = (4096, 1024, 512, 256, 64, 16, 4, 1)
LOW_RANKS = (16, 64)
# Weights in 8 bits, as they reach the kernels: below compute capability 8.9 the bits of e4m3 do.
STORED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.uint8: "e4m3 bits"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def experts_hit(tokens: int) -> float:
    """Experts that at least one of `tokens` visits under uniform routing, on average."""
    return E * (1 - (1 - K / E) ** tokens)


def configurations(arch: int, weight_bits: int = 16) -> list[tuple[torch.dtype, bool, bool, tiles.ExpertTiles, int]]:
    """`tiles.all_configs` with the T that each is launched for: the largest of TOKENS for which the tables choose it;
    of those that serve another intermediate size than Gemma-4's, which come last, the T that fills a tile per expert.
    """
    serving, others = [], []
    for dtype, aligned, lora, choice in tiles.all_configs(arch, weight_bits=weight_bits):
        for tokens in TOKENS:
            rows = tiles.rows_per_expert(tokens, K, E)
            if tiles.expert_tiles(rows, I, dtype, arch, aligned=aligned, lora=lora, weight_bits=weight_bits) == choice:
                serving.append((dtype, aligned, lora, choice, tokens))
                break
        else:
            others.append((dtype, aligned, lora, choice, choice.block_m * E // K))
    return serving + others


class Experts:
    """Operands of Gemma-4's experts on the meta device, and every launch over them; odd sizes unless `aligned`."""

    def __init__(
        self,
        recorder: Recorder,
        choice: tiles.ExpertTiles,
        tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        aligned: bool = True,
        activation: str = "gelu_tanh",
        uneven: int = 0,
        stored: torch.dtype | None = None,
    ):
        off = uneven if aligned else -1
        h, i = H + off, I + off
        rows = tokens * K
        self.recorder, self.choice, self.tokens = recorder, choice, tokens
        self.dtype, self.aligned, self.activation = dtype, aligned, activation
        self.hidden, self.weights = meta(tokens, h, dtype=dtype), meta(tokens, K, dtype=torch.float32)
        self.gate_up, self.down = meta(E, 2 * i, h, dtype=stored or dtype), meta(E, h, i, dtype=stored or dtype)
        self.scales = PLAIN
        if stored is not None:
            self.scales = Scales(meta(E, 2 * i, dtype=torch.float32), meta(E, h, dtype=torch.float32))
        self.pre, self.h = meta(rows, 2 * i, dtype=dtype), meta(rows, i, dtype=dtype)
        self.shared = str(dtype)[6:] + ("" if aligned else " odd") + (" uneven" if uneven else "")
        self.shared += "" if stored is None else f", weights {STORED[stored]}"
        # The dispatch itself is recorded elsewhere: here it only supplies its arrays.
        before = len(recorder.jobs)
        self.dispatch = launch_dispatch_fwd(meta(tokens, K, dtype=torch.int64), E, choice.block_m)
        del recorder.jobs[before:]

    def tell(self, role: str, *, activated: bool = False) -> None:
        activation = f" {self.activation}" if activated and self.activation != "gelu_tanh" else ""
        self.recorder.tell(f"{role}, {self.shared}{activation}", self.tokens, self.aligned)

    def forward(self, training: bool = False, up: LowRank | None = None, down: LowRank | None = None) -> None:
        suffix = " + pre-activation" if training else ""
        self.tell(f"up{suffix}{_rank(up)}", activated=True)
        launch_expert_up_fwd(
            self.hidden,
            self.gate_up,
            self.dispatch,
            self.activation,
            self.choice.up,
            scale=self.scales.gate_up,
            low_rank=up,
            want_preactivation=training,
        )
        self.tell(f"down{_rank(down)}")
        launch_expert_down_fwd(
            self.h, self.down, self.dispatch, self.choice.down, scale=self.scales.down, low_rank=down
        )

    def backward(
        self, down: LowRank | None = None, up: LowRank | None = None, *, frozen: bool = False, d_hidden: bool = True
    ) -> None:
        self.tell(f"d_pre{' frozen' if frozen else ''}{_rank(down)}", activated=True)
        launch_expert_down_bwd(
            self.hidden,
            self.down,
            self.pre,
            self.weights,
            self.dispatch,
            self.activation,
            self.choice.down_bwd,
            scale=self.scales.down,
            low_rank=down,
            want_weighted_h=not frozen,
        )
        if d_hidden:
            self.tell(f"d_hidden{_rank(up)}")
            launch_grouped_gemm(
                self.pre,
                self.gate_up,
                self.dispatch,
                self.choice.down,
                scale=self.scales.gate_up,
                scale_reduced=True,
                low_rank=up,
            )

    def weights_backward(self) -> None:
        gram = self.choice.gram
        self.tell("d_down")
        launch_grouped_gram(self.hidden, self.h, self.down, self.dispatch, gram, gather_left=True)
        self.tell("d_gate_up")
        launch_grouped_gram(self.pre, self.hidden, self.gate_up, self.dispatch, gram, gather_right=True)

    def lora(self, rank: int, *, narrow: bool) -> None:
        """Low-rank updates of both projections; `narrow`: also the products and gradients of the factors."""
        dispatch, choice, recorder = self.dispatch, self.choice, self.recorder

        def factors(weight: Tensor) -> LoraFactors:
            _, out, columns = weight.shape
            return pad_factors(meta(E, out, rank, dtype=self.dtype), meta(E, rank, columns, dtype=self.dtype))

        up, down = factors(self.gate_up), factors(self.down)
        before = len(recorder.jobs)
        self.tell(f"x rhs^T of up r={rank}")
        x_rhs = launch_lora_fwd(self.hidden, up, dispatch, choice, gather=True)
        self.tell(f"d lhs of up r={rank}")
        d_lhs = launch_lora_bwd(self.pre, up, dispatch, choice)
        self.tell(f"x rhs^T of down r={rank}")
        h_rhs = launch_lora_fwd(self.h, down, dispatch, choice)
        self.tell(f"d lhs of down r={rank}")
        g_lhs = launch_lora_bwd(self.hidden, down, dispatch, choice, gather=True)
        if not narrow:
            del recorder.jobs[before:]
        self.forward(training=True, up=x_rhs, down=h_rhs)
        self.backward(g_lhs, d_lhs)
        if not narrow:
            return
        self.tell(f"d_lhs of up r={rank}")
        launch_lora_lhs_bwd(self.pre, x_rhs.low, up, dispatch, choice)
        self.tell(f"d_rhs of up r={rank}")
        launch_lora_rhs_bwd(self.hidden, d_lhs.low, up, dispatch, choice, gather=True)
        self.tell(f"d_lhs of down r={rank}")
        launch_lora_lhs_bwd(self.hidden, h_rhs.low, down, dispatch, choice, gather=True)
        self.tell(f"d_rhs of down r={rank}")
        launch_lora_rhs_bwd(self.h, g_lhs.low, down, dispatch, choice)


def _rank(low: LowRank | None) -> str:
    return "" if low is None else f" r={low.low.shape[1]}"


def record_experts(recorder: Recorder) -> None:
    """Every configuration of `tiles.all_configs`."""
    arch = recorder.arch
    configs = configurations(arch)
    for dtype, aligned, lora, choice, tokens in configs:
        experts = Experts(recorder, choice, tokens, dtype, aligned)
        half = dtype == torch.bfloat16 and aligned
        if lora:
            for rank in LOW_RANKS if half and choice.block_m >= 64 else LOW_RANKS[:1]:
                experts.lora(rank, narrow=half)
            continue
        experts.forward()
        experts.forward(training=True)
        experts.backward()
        experts.weights_backward()
        if choice.block_m == 128:
            experts.backward(frozen=True, d_hidden=False)
            uneven = Experts(recorder, choice, tokens, dtype, aligned, uneven=16)
            uneven.forward()
            uneven.backward()
    widest = max((choice for *_, choice, _ in configs), key=lambda choice: (choice.block_m, choice.up.block_n))
    for dtype, activation in ((torch.bfloat16, "gelu"), (torch.bfloat16, "silu"), (torch.float16, "gelu_tanh")):
        experts = Experts(recorder, widest, TOKENS[0], dtype, activation=activation)
        experts.forward(training=True)
        experts.backward()


def record_low_bits(recorder: Recorder) -> None:
    """Every configuration of `tiles.all_configs` for frozen weights in 8 bits: int8; e4m3 for aligned 16-bit rows
    without low-rank updates. The pre-activation is stored where rows are odd or a low-rank update is added.
    """
    arch = recorder.arch
    e4m3 = torch.uint8 if arch < CONVERTS_E4M3 else torch.float8_e4m3fn
    for dtype, aligned, lora, choice, tokens in configurations(arch, weight_bits=8):
        half = dtype == torch.bfloat16
        for stored in (torch.int8, e4m3):
            launched = tiles_of_8_bits(choice, stored == torch.uint8)
            experts = Experts(recorder, launched, tokens, dtype, aligned, stored=stored)
            if lora and half and aligned and stored == torch.int8:
                experts.lora(LOW_RANKS[0], narrow=False)
            elif not lora and (half or aligned) and (stored == torch.int8 or (half and aligned)):
                experts.forward()
                if not aligned:
                    experts.forward(training=True)
                experts.backward(frozen=True)


def record_around_experts(recorder: Recorder) -> None:
    """Dispatch and combine."""
    for tokens, block_m, experts in ((16, 16, E), (512, 32, E), (16384, 128, E), (16384, 128, 257)):
        recorder.tell("" if experts == E else f"E={experts}", tokens)
        launch_dispatch_fwd(meta(tokens, K, dtype=torch.int64), experts, block_m)
    tokens = 256
    for dtype, top_k, weighted in ((torch.bfloat16, K, True), (torch.bfloat16, K, False), (torch.float32, 32, True)):
        recorder.tell(f"{str(dtype)[6:]} K={top_k}{'' if weighted else ' unweighted'}", tokens)
        rows = tokens * top_k
        weights = meta(tokens, top_k, dtype=torch.float32) if weighted else None
        launch_combine_fwd(meta(rows, H, dtype=dtype), meta(rows, dtype=torch.int32), weights, top_k)


def record_experts_of_ones(recorder: Recorder) -> None:
    """Every size is 1, which Triton turns into a constant."""

    def tell(role: str) -> None:
        recorder.tell(f"{role}, all sizes 1", 1, aligned=False)

    choice = tiles.expert_tiles(1, 1, torch.bfloat16, recorder.arch, aligned=False)
    tell("any")
    dispatch = launch_dispatch_fwd(meta(1, 1, dtype=torch.int64), 1, choice.up.block_m)
    one, three = meta(1, 1), meta(1, 1, 1)
    h, pre = launch_expert_up_fwd(one, meta(1, 2, 1), dispatch, "gelu_tanh", choice.up, want_preactivation=True)
    assert h is not None
    assert pre is not None
    tell("down")
    y = launch_expert_down_fwd(h, three, dispatch, choice.down)
    tell("any")
    launch_combine_fwd(y, dispatch.position, one, 1)
    launch_expert_down_bwd(one, three, pre, one, dispatch, "gelu_tanh", choice.down_bwd, want_weighted_h=True)
    tell("d_hidden")
    launch_grouped_gemm(pre, meta(1, 2, 1), dispatch, choice.down)
    tell("d_down")
    launch_grouped_gram(one, one, three, dispatch, choice.gram, gather_left=True)
    factors = pad_factors(three, three)
    tell("x rhs^T")
    low = launch_lora_fwd(one, factors, dispatch, choice, gather=True).low
    tell("d lhs")
    launch_lora_bwd(one, factors, dispatch, choice)
    tell("d_lhs")
    launch_lora_lhs_bwd(one, low, factors, dispatch, choice)
    tell("d_rhs")
    launch_lora_rhs_bwd(one, low, factors, dispatch, choice, gather=True)
