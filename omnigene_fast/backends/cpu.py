"""The C++ backend: hands pointers to `omnigene_fast._cpu`, which picks its instruction set by CPUID when first used."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import Lora

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        _cpu = importlib.import_module("omnigene_fast._cpu")
    except ImportError as error:
        return None, (
            "the C++ module omnigene_fast._cpu was not built or cannot be loaded"
            f" ({error}); install a C++ compiler (g++) and reinstall omnigene-fast."
        )
    try:
        _cpu.isa()
    except RuntimeError as error:  # OMNIGENE_FAST_CPU_ISA names what this processor lacks
        return None, str(error)
    return _cpu, None


def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def unavailable(device: torch.device) -> str | None:
    """None if this backend can serve tensors on `device`, else one sentence: why not, and the way out."""
    if device.type != "cpu":
        return f"the C++ kernels need CPU tensors, got device {device}; use backend='auto'."
    return _load()[1]


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16" (override: OMNIGENE_FAST_CPU_ISA)."""
    return _module().isa()


def probe_bandwidth(seconds: float = 0.2, buffer: Tensor | None = None) -> float:
    """Read bandwidth of main memory in GB/s with torch's thread count: the best pass within `seconds`, at least one.

    Args:
        seconds: how long to repeat.
        buffer: contiguous CPU tensor to read, far larger than the last-level cache; 1 GiB is allocated if None.
    """
    if buffer is None:
        buffer = torch.ones(2**30, dtype=torch.uint8)
    size = buffer.numel() * buffer.element_size()
    return _module().probe_bandwidth(buffer.data_ptr(), size, seconds, torch.get_num_threads()) / 1e9


def probe_peak(dtype: str = "bfloat16", seconds: float = 0.1) -> float:
    """Peak multiply-add rate in GFLOP/s for "bfloat16" or "float32" with torch's thread count."""
    return _module().probe_peak(DTYPES[getattr(torch, dtype)], seconds, torch.get_num_threads()) / 1e9


def route(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    top_k: int,
    eps: float,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, proj_weight = _rows(hidden), _rows(proj_weight)
    scale, per_expert_scale = scale.contiguous(), per_expert_scale.contiguous()
    (T, H), E = hidden.shape, proj_weight.shape[0]
    probabilities, weights, index = _gate_outputs(T, E, top_k)
    if T:
        _module().route(
            hidden.data_ptr(), hidden.stride(0), proj_weight.data_ptr(), proj_weight.stride(0), scale.data_ptr(),
            per_expert_scale.data_ptr(), probabilities.data_ptr(), weights.data_ptr(), index.data_ptr(), T, top_k, E, H,
            eps, H**-0.5, DTYPES[hidden.dtype], numerics == "hf", torch.get_num_threads(),
        )  # fmt: skip
    return probabilities, weights, index


def topk_gate(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, per_expert_scale = _rows(logits), per_expert_scale.contiguous()
    if per_expert_scale.dtype not in DTYPES:
        per_expert_scale = per_expert_scale.float()
    T, E = logits.shape
    probabilities, weights, index = _gate_outputs(T, E, top_k)
    if T:
        _module().topk_gate(
            logits.data_ptr(), logits.stride(0), per_expert_scale.data_ptr(), probabilities.data_ptr(),
            weights.data_ptr(), index.data_ptr(), T, top_k, E, DTYPES[logits.dtype], DTYPES[per_expert_scale.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
    return probabilities, weights, index


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    lora: Lora,
    activation: str,
    expert_parallel: bool,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    if lora.gate_up_lhs is not None or lora.down_lhs is not None or save_preactivation:  # TEMPORARY until the C++ lands
        from .. import reference
        from .._library import _pairs

        out = reference.expert_mlp(hidden, gate_up_proj, down_proj, index, weights, activation=activation, **_pairs(lora))
        return out, hidden.new_zeros((index.numel(), gate_up_proj.shape[1])) if save_preactivation else None
    hidden = _rows(hidden)
    index = index.to(torch.int64).contiguous()
    weights = weights.to(torch.float32).contiguous()
    (T, H), K, (E, I2, _) = hidden.shape, index.shape[1], gate_up_proj.shape
    out = torch.empty((T, H), dtype=hidden.dtype)
    if T and H:
        _module().expert_mlp(
            hidden.data_ptr(), hidden.stride(0), gate_up_proj.data_ptr(), gate_up_proj.stride(0),
            gate_up_proj.stride(1), down_proj.data_ptr(), down_proj.stride(0), down_proj.stride(1), index.data_ptr(),
            weights.data_ptr(), out.data_ptr(), T, K, E, H, I2 // 2, DTYPES[hidden.dtype], ACTIVATIONS[activation],
            expert_parallel,
            torch.get_num_threads(),
        )  # fmt: skip
    return out, None


def topk_gate_bwd(grad_probabilities, grad_weights, probabilities, index, per_expert_scale, need_scale):  # TEMPORARY
    from .. import reference

    return reference.topk_gate_bwd(grad_probabilities, grad_weights, probabilities, index, per_expert_scale)


def route_bwd(d_logits, hidden, proj_weight, scale, eps, needed):  # TEMPORARY
    from .. import reference

    return reference.route_bwd(d_logits, hidden, proj_weight, scale, eps=eps)


def expert_mlp_bwd(
    grad_out, hidden, gate_up_proj, down_proj, index, weights, lora, preactivation, activation, expert_parallel, needed
):  # TEMPORARY
    from .. import reference
    from .._library import _pairs

    return reference.expert_mlp_bwd(
        grad_out, hidden, gate_up_proj, down_proj, index, weights, activation=activation, needed=needed, **_pairs(lora)
    )


def _rows(x: Tensor) -> Tensor:
    """`x` itself if its rows are contiguous, whatever the step from row to row, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _gate_outputs(T: int, E: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((T, E), dtype=torch.float32),
        torch.empty((T, K), dtype=torch.float32),
        torch.empty((T, K), dtype=torch.int64),
    )
