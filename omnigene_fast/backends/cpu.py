"""The C++ backend: hands pointers to `omnigene_fast._cpu`, which picks its instruction set by CPUID when first used."""

import functools
import importlib
import threading
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import PLAIN, Lora, Scales, TraceBuffers

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORED = {torch.int8: 1, torch.float8_e4m3fn: 2}  # projections with scales; 0: in the dtype of `hidden`
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2}
_LARGE = 32 << 20  # bytes from which fresh pages cost more than keeping old ones
_MOST_KEPT = 2 << 30  # bytes, about the expert weights of one layer of Gemma-4-26B
_kept: list[torch.UntypedStorage] = []  # of large gradients, those in use among them
_keeping = threading.Lock()


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
    trace: TraceBuffers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, proj_weight = _rows(hidden), _rows(proj_weight)
    scale, per_expert_scale = scale.contiguous(), per_expert_scale.contiguous()
    (T, H), E = hidden.shape, proj_weight.shape[0]
    probabilities, weights, index = _gate_outputs(T, E, top_k)
    if T:
        _module().route(
            hidden.data_ptr(), hidden.stride(0), proj_weight.data_ptr(), proj_weight.stride(0), scale.data_ptr(),
            per_expert_scale.data_ptr(), probabilities.data_ptr(), weights.data_ptr(), index.data_ptr(), T, top_k, E, H,
            eps, H**-0.5, DTYPES[hidden.dtype], numerics == "hf", torch.get_num_threads(), _trace(trace),
        )  # fmt: skip
    return probabilities, weights, index


def topk_gate(
    logits: Tensor, per_expert_scale: Tensor, top_k: int, trace: TraceBuffers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    logits, per_expert_scale = _rows(logits), per_expert_scale.contiguous()
    if per_expert_scale.dtype not in DTYPES:
        per_expert_scale = per_expert_scale.float()
    T, E = logits.shape
    probabilities, weights, index = _gate_outputs(T, E, top_k)
    if T:
        _module().topk_gate(
            logits.data_ptr(), logits.stride(0), per_expert_scale.data_ptr(), probabilities.data_ptr(),
            weights.data_ptr(), index.data_ptr(), T, top_k, E, DTYPES[logits.dtype], DTYPES[per_expert_scale.dtype],
            torch.get_num_threads(), _trace(trace),
        )  # fmt: skip
    return probabilities, weights, index


def topk_gate_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    index: Tensor,
    per_expert_scale: Tensor,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    T, E = probabilities.shape
    d_logits = torch.empty((T, E), dtype=torch.float32)
    d_scale = torch.empty(E, dtype=torch.float32) if need_scale else None
    # Tensors that may be copies live until the call returns: only their addresses are handed over.
    floats = [_float(x) for x in (grad_probabilities, grad_weights, probabilities, per_expert_scale)]
    index = index.contiguous()
    _module().topk_gate_grad(
        _address(floats[0]), _address(floats[1]), _address(floats[2]), index.data_ptr(), _address(floats[3]),
        d_logits.data_ptr(), _address(d_scale), T, index.shape[1], E, torch.get_num_threads(),
    )  # fmt: skip
    return d_logits, d_scale


def route_bwd(
    d_logits: Tensor, hidden: Tensor, proj_weight: Tensor, scale: Tensor, eps: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, scale = _rows(hidden), scale.contiguous()
    T, H = hidden.shape
    d_logits = d_logits.to(hidden.dtype)  # as the projection's output was
    d_hidden = torch.empty((T, H), dtype=hidden.dtype) if needed[0] else None
    d_scale = torch.empty(H, dtype=torch.float32) if needed[2] else None
    if needed[0] or needed[2]:
        d_scaled = d_logits @ proj_weight
        _module().norm_scale_grad(
            d_scaled.data_ptr(), (hidden.data_ptr(), hidden.stride(0)), scale.data_ptr(), _address(d_hidden),
            _address(d_scale), T, H, eps, H**-0.5, DTYPES[hidden.dtype], torch.get_num_threads(),
        )  # fmt: skip
    d_proj = None
    if needed[1]:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        d_proj = d_logits.T @ (normed.to(hidden.dtype) * scale * H**-0.5)
    return d_hidden, d_proj, d_scale


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
    scales: Scales = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    arguments = _ExpertArguments(hidden, gate_up_proj, down_proj, index, weights, lora, activation, scales)
    out = torch.empty(hidden.shape, dtype=hidden.dtype)
    preactivation = arguments.new_preactivation() if save_preactivation else None
    if hidden.numel():
        _module().expert_mlp(arguments.packed, out.data_ptr(), _address(preactivation), expert_parallel)
    return out, preactivation


def expert_mlp_bwd(
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
    inputs = (hidden, gate_up_proj, down_proj, weights, *lora)
    if scales.gate_up is not None and (needed[1] or needed[2]):
        raise ValueError(
            "needed: expected no gradient of projections stored in 8 bits, which are frozen, got"
            f" {list(needed)}; dequantise them first if they are to be trained."
        )
    grads = [
        None if not need or x is None else _new_gradient(x.shape, torch.float32 if x is weights else x.dtype)
        for x, need in zip(inputs, needed, strict=True)
    ]
    if hidden.numel() == 0 or down_proj.shape[2] == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    arguments = _ExpertArguments(hidden, gate_up_proj, down_proj, index, weights, lora, activation, scales)
    grad_out = _rows(grad_out)
    if preactivation is None:
        preactivation = arguments.new_preactivation()
        _module().expert_mlp(arguments.packed, 0, preactivation.data_ptr(), expert_parallel)
    _module().expert_mlp_grad(
        arguments.packed,
        (grad_out.data_ptr(), grad_out.stride(0)),
        preactivation.data_ptr(),
        [_address(grad) for grad in grads],
    )
    return tuple(grads)


def release_memory() -> None:
    """Give back to the system what is kept for the next gradients of expert weights, 2 GiB at most."""
    with _keeping:
        _kept.clear()


def _new_gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one in memory that an earlier one has left, if there is some.

    Mapping and clearing fresh pages takes longer than computing a weight gradient (docs/performance.md). The memory is
    torch's own, so that whoever owns the gradient may resize its storage.
    """
    size = shape.numel() * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    with _keeping:
        free = [each for each in _kept if torch._C._storage_Use_Count(each._cdata) == 1]
        storage = next((each for each in free if each.nbytes() == size), None)
        if storage is None:
            storage = torch.empty(size, dtype=torch.uint8).untyped_storage()
            _module().advise_huge_pages(storage.data_ptr(), size)
            for other in free:  # gradients come back in the sizes in which they went, and these did not
                if _kept_bytes() + size > _MOST_KEPT:
                    _kept[:] = [each for each in _kept if each is not other]
            if _kept_bytes() + size <= _MOST_KEPT:
                _kept.append(storage)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def _kept_bytes() -> int:
    return sum(each.nbytes() for each in _kept)


class _ExpertArguments:
    """The arguments of an experts call as the C++ module takes them; `kept` owns copies whose addresses it holds."""

    def __init__(
        self,
        hidden: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        index: Tensor,
        weights: Tensor,
        lora: Lora,
        activation: str,
        scales: Scales,
    ) -> None:
        hidden, index = _rows(hidden), index.to(torch.int64).contiguous()
        weights = weights.to(torch.float32).contiguous()
        factors = [None if factor is None else factor.contiguous() for factor in lora]
        row_scales = [_float(scale) for scale in scales]
        self.kept = (hidden, index, weights, factors, row_scales)
        (T, H), K, (E, I2, _) = hidden.shape, index.shape[1], gate_up_proj.shape
        self.rows, self.columns, self.dtype = T * K, I2, hidden.dtype
        ranks = [0 if factor is None else factor.shape[1] for factor in factors]
        self.packed = _module().ExpertArgs(
            (hidden.data_ptr(), hidden.stride(0)),
            (gate_up_proj.data_ptr(), gate_up_proj.stride(0), gate_up_proj.stride(1)),
            (down_proj.data_ptr(), down_proj.stride(0), down_proj.stride(1)),
            index.data_ptr(),
            weights.data_ptr(),
            (_address(factors[0]), _address(factors[1]), ranks[1]),
            (_address(factors[2]), _address(factors[3]), ranks[3]),
            (0 if scales.gate_up is None else STORED[gate_up_proj.dtype], *map(_address, row_scales)),
            (T, K, E, H, I2 // 2),
            DTYPES[hidden.dtype],
            ACTIVATIONS[activation],
            torch.get_num_threads(),
        )

    def new_preactivation(self) -> Tensor:
        return torch.empty((self.rows, self.columns), dtype=self.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _trace(trace: TraceBuffers | None) -> tuple[int, int, int, int]:
    if trace is None:
        return 0, 0, 0, 0
    return trace.ids.data_ptr(), trace.ids.element_size(), _address(trace.weights), _address(trace.stats)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _rows(x: Tensor) -> Tensor:
    """`x` itself if its rows are contiguous, whatever the step from row to row, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _gate_outputs(T: int, E: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((T, E), dtype=torch.float32),
        torch.empty((T, K), dtype=torch.float32),
        torch.empty((T, K), dtype=torch.int64),
    )
