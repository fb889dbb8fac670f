"""What the launchers would launch: runs them on meta tensors, with `JITFunction.run` replaced by a recorder.

So what is compiled is what a GPU would be asked to run: the signature, the constants and the alignment that Triton's
own specialisation would choose for these arguments.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.jit import JITFunction

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton that old has no host-side descriptors, so no launcher passes one
    TensorDescriptor = None

ELEMENTS = {
    torch.bool: "i1",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Arguments of a launch that are neither the kernel's nor an option of its compilation.
_NO_OPTIONS = ("grid", "warmup")


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel is given; `descriptor`: by TMA descriptor."""

    shape: tuple[int, ...]
    itemsize: int
    descriptor: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Job:
    """One compilation, and what is known of the launch that asked for it."""

    arch: int
    module: str
    function: str
    what: str  # role, dtype and whatever else tells launches of the same tile apart
    tokens: int  # T of the launch: one that the configuration serves
    aligned: bool
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[int, int]  # position of an argument -> what divides it
    options: dict[str, Any]
    programs: int
    operands: dict[str, Operand] = field(default_factory=dict)
    scalars: dict[str, int] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """The function's name without what all of them share."""
        return self.function.strip("_").removesuffix("_kernel")

    @property
    def tile(self) -> str:
        """The blocks of the tile, as 128x64x64."""
        names: tuple[str, ...] = ("BLOCK_M", "BLOCK_T", "BLOCK_N", "BLOCK_E", "BLOCK_K", "BLOCK_H", "BLOCK")
        if "BLOCK_N" not in self.constants:  # there BLOCK_K is top-k's padding, which is in no tile's shape
            names = ("BLOCK_M", "BLOCK_T", "BLOCK_E", "BLOCK_H", "BLOCK")
        return "x".join(str(self.constants[name]) for name in names if name in self.constants)

    @property
    def half(self) -> bool:
        """Whether its products are of 16-bit operands: the first operand is, and float32 was not asked for."""
        kinds = [kind for kind in self.signature.values() if kind.startswith(("*", "tensordesc"))]
        return kinds[0] in ("*bf16", "*fp16") and self.constants.get("NUMERICS") != "fp32"

    @property
    def compiled(self) -> tuple[object, ...]:
        """What the compiler sees. Launches that agree in it are one job."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.arch, self.module, self.function, *(repr(sorted(part.items())) for part in parts)


@dataclass
class Recorder:
    """Stands in for `JITFunction.run`. `what`, `tokens` and `aligned` describe the launches that follow."""

    arch: int
    jobs: list[Job] = field(default_factory=list)
    what: str = ""
    tokens: int = 0
    aligned: bool = True

    def tell(self, what: str, tokens: int, aligned: bool = True) -> None:
        self.what, self.tokens, self.aligned = what, tokens, aligned

    def record(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[int, int] = {}
        operands: dict[str, Operand] = {}
        scalars: dict[str, int] = {}
        for position, (name, parameter) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
            value = bound.get(name, parameter.default)
            divisible = False
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + ELEMENTS[value.dtype]
                operands[name] = Operand(tuple(value.shape), value.dtype.itemsize)
                divisible = self.aligned and not parameter.do_not_specialize_on_alignment
            elif TensorDescriptor is not None and isinstance(value, TensorDescriptor):
                block = ",".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{ELEMENTS[value.base.dtype]}[{block}]>"
                operands[name] = Operand(tuple(value.base.shape), value.base.dtype.itemsize, descriptor=True)
            elif isinstance(value, bool):
                signature[name] = "u1"
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif isinstance(value, int):
                scalars[name] = value
                if value == 1 and not parameter.do_not_specialize:
                    signature[name], constants[name] = "constexpr", 1
                else:
                    signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                    divisible = value % 16 == 0 and not parameter.do_not_specialize
            else:
                raise TypeError(f"{fn.__name__}: {name} is a {type(value).__name__}, which the recorder does not know.")
            if divisible:
                attributes[position] = 16
        options = {name: value for name, value in kwargs.items() if name not in (*fn.arg_names, *_NO_OPTIONS)}
        grid = kwargs["grid"](bound) if callable(kwargs["grid"]) else kwargs["grid"]
        self.jobs.append(
            Job(
                arch=self.arch,
                module=fn.fn.__module__,
                function=fn.fn.__name__,
                what=self.what,
                tokens=self.tokens,
                aligned=self.aligned,
                signature=signature,
                constants=constants,
                attributes=attributes,
                options={"num_warps": 4, "num_stages": 3} | options,
                programs=math.prod(grid),
                operands=operands,
                scalars=scalars,
            )
        )

    def unique(self) -> list[Job]:
        """The recorded jobs; launches that differ in no more than what they are called for, once."""
        first: dict[tuple[object, ...], Job] = {}
        for job in self.jobs:
            first.setdefault(job.compiled, job)
        return list(first.values())


@contextmanager
def recording(arch: int) -> Iterator[Recorder]:
    """Inside, every launch of a Triton kernel is recorded and none takes place."""
    recorder = Recorder(arch)
    original = JITFunction.run

    def run(fn: Any, *args: Any, **kwargs: Any) -> None:
        recorder.record(fn, args, kwargs)

    JITFunction.run = run
    try:
        yield recorder
    finally:
        JITFunction.run = original
