"""The CUDA C++ kernels in the report: every instantiation of `omnigene_fast.cuda`, compiled by NVRTC.

As with Triton's, what is recorded is a launch of Gemma-4's experts on meta tensors: `expert_mlp` of the decode path
with a recorder in place of the launcher. T is the most tokens that the path serves.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import PLAIN, Scales
from . import sass
from .built import Built
from .experts import E, H, I, K, experts_hit, meta
from .recorder import Operand

_LOW_BIT = (torch.int8, torch.float8_e4m3fn)
_CUDA = f"{__name__.split('.')[0]}.cuda"


@dataclass(frozen=True)
class CudaJob:
    """One instantiation for one architecture, and the launch that it serves."""

    arch: int
    instance: Any  # omnigene_fast.cuda.Kernel
    tokens: int
    programs: int
    operands: dict[str, Operand] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        return str(self.instance.name)

    @property
    def what(self) -> str:
        """Such as "bfloat16 weights int8 unaligned"."""
        return str(self.instance).removeprefix(self.kernel).strip()

    @property
    def flops(self) -> int:
        """Of both matrices in the first kernel, of one in the second."""
        return 2 * self.tokens * K * H * I * (2 if "up" in self.kernel else 1)

    def key(self) -> str:
        """Hash of all that the cubin depends on."""
        nvrtc = _module("nvrtc")
        options = nvrtc.options(f"sm_{self.arch}", self.instance.macros)
        parts = (nvrtc.sources(), self.instance.source, options, nvrtc.version())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _module(name: str) -> Any:
    return importlib.import_module(f"{_CUDA}.{name}")


def jobs(arch: int) -> list[CudaJob]:
    """Every instantiation, if NVRTC is there and knows `arch`."""
    if missing(arch) is not None:
        return []
    launched = _launches()
    return [CudaJob(arch, kernel, *launched[kernel]) for kernel in _module("kernel").all_kernels()]


def missing(arch: int) -> str | None:
    """None if CUDA C++ kernels compile for `arch` here, else one sentence with the way out."""
    if importlib.util.find_spec(_CUDA) is None:
        return f"the CUDA C++ kernels are left out for sm_{arch}: this package has none."
    nvrtc, sentence = _module("nvrtc"), _module("launch").unavailable()
    if sentence is None and nvrtc.newest_arch() < arch:
        sentence = f"NVRTC {nvrtc.version()} does not know sm_{arch}; `pip install -U nvidia-cuda-nvrtc`."
    return sentence and f"the CUDA C++ kernels are left out for sm_{arch}: {sentence}"


def _launches() -> dict[Any, tuple[int, int, dict[str, Operand]]]:
    """T, blocks and operands of the launch of each instantiation."""
    decode = _module("decode")
    found: dict[Any, tuple[int, int, dict[str, Operand]]] = {}
    tokens = decode.MAX_TOKENS

    def record(device: torch.device, launches: Iterable[Any]) -> None:
        for launch in launches:
            tensors = (argument for argument in launch.arguments if isinstance(argument, Tensor))
            operands = {
                str(number): Operand(tuple(tensor.shape), tensor.dtype.itemsize)
                for number, tensor in enumerate(tensors)
            }
            columns, picks = launch.grid
            working = columns * (round(experts_hit(tokens)) if picks > 1 else 1)  # a block per expert and columns stays
            found.setdefault(launch.kernel, (tokens, working, operands))

    for hidden_type in _module("kernel").HIDDEN:
        for weight_type in (hidden_type, *_LOW_BIT):
            for odd in (0, 1):
                h, i = H - odd, I - odd
                scales = Scales(meta(E, 2 * i, dtype=torch.float32), meta(E, h, dtype=torch.float32))
                decode.expert_mlp(
                    meta(tokens, h, dtype=hidden_type),
                    meta(E, 2 * i, h, dtype=weight_type),
                    meta(E, h, i, dtype=weight_type),
                    meta(tokens, K, dtype=torch.int64),
                    meta(tokens, K, dtype=torch.float32),
                    "gelu_tanh",
                    PLAIN if weight_type == hidden_type else scales,
                    run=record,
                )
    return found


def build(todo: Sequence[CudaJob]) -> list[Built]:
    """Compiles jobs of one architecture."""
    cubins = [job.instance.cubin(f"sm_{job.arch}") for job in todo]
    images = [sass.texts(cubin)[job.kernel] for job, cubin in zip(todo, cubins, strict=True)]
    built = []
    for job, cubin, code in zip(todo, cubins, sass.disassemble(images, todo[0].arch), strict=True):
        usage = sass.usage(cubin)[job.kernel]
        built.append(
            Built(
                threads=job.instance.threads,
                registers=usage.registers,
                stack=usage.stack + usage.local,
                spill=code.local_bytes(),
                shared=usage.shared,
                tensor_columns=0,
                tensor_cores=code.tensor_cores(),
                load=code.load(),
                cubin_bytes=len(cubin),
            )
        )
    return built
