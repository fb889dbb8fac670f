"""The experts for up to 16 tokens: two kernels that go straight from the ids to the output, without a sort.

`decode_up` writes the activation of every pick, `decode_down` multiplies it with the down projections and adds each
token's picks (see csrc/cuda). Nothing is read back to the host and no size depends on the routing, so a CUDA graph that
holds a decode step serves every routing. The result does not depend on the order in which blocks run, nor, from 4 picks
on, on the other tokens of the step.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..backends import PLAIN, Lora, Scales
from .kernel import HIDDEN, LOW_BIT, Kernel
from .launch import Launch, launch, unavailable
from .launch import prepare as _prepare

logger = logging.getLogger("omnigene_fast")

MAX_TOKENS = MAX_TOP_K = 16
COLUMNS = 8  # of the output of a block, in both kernels
PARTS = 4  # warps of decode_down: with fewer picks than that, a pick's sum is shared by several
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2}
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Run = Callable[[torch.device, Iterable[Launch]], None]


def enabled() -> bool:
    """Whether OMNIGENE_FAST_DECODE leaves the decode path on, as it does unless it is 0."""
    return os.environ.get("OMNIGENE_FAST_DECODE", "1") != "0"


def serves(hidden: Tensor, gate_up_proj: Tensor, index: Tensor, lora: Lora, save_preactivation: bool) -> bool:
    """Whether `expert_mlp` of this file takes these arguments, which are those of the backends' `expert_mlp`."""
    T, K = index.shape
    return (
        1 <= T <= MAX_TOKENS
        and K <= MAX_TOP_K
        and hidden.device.type == "cuda"
        and not save_preactivation
        and all(factor is None for factor in lora)
        and hidden.dtype in HIDDEN
        and (gate_up_proj.dtype == hidden.dtype or gate_up_proj.dtype in LOW_BIT)
        and hidden.numel() > 0
        and gate_up_proj.numel() > 0
        and enabled()
        and _available(hidden.device)
    )


def _available(device: torch.device) -> bool:
    """Whether the kernels run on `device`; if not, the reason is logged, once."""
    reason = unavailable(device)
    if reason is not None:
        _log_once(reason)
    return reason is None


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("Triton's grouped GEMMs serve steps of up to %d tokens: %s", MAX_TOKENS, reason)


def prepare(device: torch.device, hidden: torch.dtype, weight: torch.dtype | None = None, *, vec: bool = True) -> None:
    """Compile and load the two kernels for these types; else the first step does it, which no capture allows.

    `weight` is the type that the projections are stored in, by default that of `hidden`; `vec` whether rows begin at
    multiples of 16 bytes and hold whole chunks of 16 bytes, as Gemma-4's do.
    """
    names = ("decode_up", "decode_down")
    _prepare(device, [Kernel(name, hidden, weight or hidden, vec) for name in names])


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    activation: str,
    scales: Scales = PLAIN,
    run: Run = launch,
) -> Tensor:
    """`omnigene_fast.ops.expert_mlp` on validated arguments that `serves` accepted; `run` launches the kernels."""
    T, K = index.shape
    E, H, I = down_proj.shape  # noqa: E741
    N = T * K
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    index, weights = index.contiguous(), weights.contiguous()
    up_scale, down_scale = (None if scale is None else scale.contiguous() for scale in scales)
    chunk = 16 // down_proj.element_size()
    row = -(-I // 16) * 16  # so that rows of h begin at multiples of 16 bytes
    h = torch.empty((N, row), dtype=hidden.dtype, device=hidden.device)
    out = torch.empty((T, H), dtype=hidden.dtype, device=hidden.device)
    up_vec = H % chunk == 0 and _aligned(hidden) and _aligned(gate_up_proj)
    down_vec = I % chunk == 0 and _aligned(down_proj)
    wide_ids = int(index.dtype == torch.int64)
    splits = 1
    while splits < PARTS and N * splits < PARTS:
        splits *= 2
    up = Launch(
        Kernel("decode_up", hidden.dtype, gate_up_proj.dtype, up_vec),
        (-(-I // COLUMNS), N),
        (
            *(hidden, gate_up_proj, up_scale, index, h),
            *(N, K, E, H, I, hidden.stride(0), *gate_up_proj.stride()[:2], row),
            *(wide_ids, ACTIVATIONS[activation]),
        ),
    )
    down = Launch(
        Kernel("decode_down", hidden.dtype, down_proj.dtype, down_vec),
        (-(-H // COLUMNS), 1),
        (
            *(h, down_proj, down_scale, index, weights, out),
            *(N, K, E, H, I, row, *down_proj.stride()[:2]),
            *(wide_ids, WEIGHT_TYPES[weights.dtype], splits),
        ),
        after_previous=True,
    )
    run(hidden.device, (up, down))
    return out


def _aligned(tensor: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    rows = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return tensor.data_ptr() % 16 == 0 and all(n == 1 or stride * size % 16 == 0 for n, stride in rows)
