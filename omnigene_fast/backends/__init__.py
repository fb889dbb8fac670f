"""Backends: each turns an operator call into kernel launches, or says in one sentence why it cannot.

A backend is a module with the functions of `Backend`. Importing one must not need its compiler, its device or its
packages: `unavailable` answers for them.
"""

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

logger = logging.getLogger("omnigene_fast")

NAMES = ("auto", "cpu", "triton", "reference")


class Lora(NamedTuple):
    """Low-rank updates of the two projections, W + lhs @ rhs; a pair is None where there is none."""

    gate_up_lhs: Tensor | None  # [E, 2I, r]
    gate_up_rhs: Tensor | None  # [E, r, H]
    down_lhs: Tensor | None  # [E, H, s]
    down_rhs: Tensor | None  # [E, s, I]


class Scales(NamedTuple):
    """Scales of projections stored in 8 bits, float32: the weight is float(stored) * scale of its row. None: plain."""

    gate_up: Tensor | None = None  # [E, 2I]
    down: Tensor | None = None  # [E, H]


PLAIN = Scales()


class TraceBuffers(NamedTuple):
    """Where a gate writes its decisions: row t is token t, and rows past the T of a call stay as they are."""

    # [T_max, K] uint8 (up to 254 experts) or int16 that holds the bits of uint16; contiguous. Of a token whose
    # probabilities are NaN all are -2, which is 254 or 65534, whatever experts the gate returns.
    ids: Tensor
    weights: Tensor | None = None  # [T_max, K] float16: the weights that the gate returns, rounded
    stats: Tensor | None = None  # [T_max, 3] float16: entropy of the softmax in nats, sum of the chosen, p_K - p_(K+1)


class Backend(Protocol):
    """What every backend module provides. The arguments arrive validated by `omnigene_fast.ops`."""

    def unavailable(self, device: torch.device) -> str | None:
        """None if this backend can serve tensors on `device`, else one sentence: why not, and the way out."""

    def route(
        self,
        hidden: Tensor,
        proj_weight: Tensor,
        scale: Tensor,
        per_expert_scale: Tensor,
        top_k: int,
        eps: float,
        numerics: str,
        trace: TraceBuffers | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def route_bwd(
        self,
        d_logits: Tensor,
        hidden: Tensor,
        proj_weight: Tensor,
        scale: Tensor,
        eps: float,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, proj_weight and scale (where `needed`) from those of the logits [T, E] float32."""

    def topk_gate(
        self, logits: Tensor, per_expert_scale: Tensor, top_k: int, trace: TraceBuffers | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def topk_gate_bwd(
        self,
        grad_probabilities: Tensor | None,
        grad_weights: Tensor | None,
        probabilities: Tensor,
        index: Tensor,
        per_expert_scale: Tensor,
        need_scale: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the logits [T, E] float32 and, if `need_scale`, of per_expert_scale [E] float32."""

    def expert_mlp(
        self,
        hidden: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        index: Tensor,
        weights: Tensor,
        lora: Lora,
        activation: str,
        expert_parallel: bool,
        save_preactivation: bool,
        scales: Scales = PLAIN,
    ) -> tuple[Tensor, Tensor | None]:
        """The output [T, H] and, if `save_preactivation`, the output of gate_up_proj [T * K, 2I] in the dtype of
        `hidden`, row t * K + k for pick k of token t; rows of sentinels may hold anything."""

    def expert_mlp_bwd(
        self,
        grad_out: Tensor,
        hidden: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        index: Tensor,
        weights: Tensor,
        lora: Lora,
        preactivation: Tensor | None,
        activation: str,
        expert_parallel: bool,
        needed: Sequence[bool],
        scales: Scales = PLAIN,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, gate_up_proj, down_proj, weights and the four of `lora`, None where not `needed`;
        the pre-activation is computed again if it is None. `grad_out` may have any strides."""


def load(name: str) -> Backend:
    """The backend module called `name` ("cpu" or "triton")."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


@functools.cache
def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend for tensors of `dtype` on `device`; None stands for `omnigene_fast.reference`.

    An explicit request never falls back: it raises RuntimeError with the backend's own sentence. "auto" takes Triton on
    CUDA and C++ on the CPU. Without the C++ module the CPU runs the reference, said once in the log. float64 is the
    oracle's dtype and always runs the reference.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}.")
    if name == "reference" or (name == "auto" and dtype == torch.float64):
        return None
    wanted = name if name != "auto" else {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if wanted is None:
        raise RuntimeError(
            f"backend: no kernels for device type {device.type!r}; move the tensors to cuda or cpu, "
            "or ask for backend='reference'."
        )
    if dtype == torch.float64:
        raise RuntimeError(f"backend: {wanted!r} has no float64 kernels; use 'auto' or 'reference' for float64.")
    backend = load(wanted)
    reason = backend.unavailable(device)
    if reason is None:
        return backend
    if name == "auto" and wanted == "cpu":
        logger.warning("omnigene_fast runs its slow PyTorch reference on the CPU: %s", reason)
        return None
    raise RuntimeError(f"backend: {wanted!r} is not available: {reason}")
