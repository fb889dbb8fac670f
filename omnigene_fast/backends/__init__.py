"""Backends: each turns an operator call into kernel launches, or says in one sentence why it cannot.

A backend is a module with the functions of `Backend`. Importing one must not need its compiler, its device or its
packages: `unavailable` answers for them.
"""

import functools
import importlib
import logging
from typing import Protocol, cast

import torch
from torch import Tensor

logger = logging.getLogger("omnigene_fast")

NAMES = ("auto", "cpu", "triton", "reference")


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
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def topk_gate(self, logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def expert_mlp(
        self,
        hidden: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        index: Tensor,
        weights: Tensor,
        activation: str,
        expert_parallel: bool,
    ) -> Tensor: ...


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
