"""The kernels by name: which source, compiled with which types, launched with how many threads."""

import itertools
from typing import NamedTuple

import torch

from . import cache, nvrtc

NAMES = ("decode_up", "decode_down")
THREADS = {"decode_up": 128, "decode_down": 128}  # UP_WARPS and DOWN_WARPS of the sources, in threads
# The types' names in csrc/cuda/device.cuh.
HIDDEN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}
LOW_BIT = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


class Kernel(NamedTuple):
    """One instantiation of a kernel of `csrc/cuda`."""

    name: str
    hidden: torch.dtype
    weight: torch.dtype  # that of `hidden`, int8 or float8_e4m3fn
    vec: bool  # rows begin at multiples of 16 bytes and hold whole chunks of 16 bytes

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.hidden, self.weight)]
        return f"{self.name} {names[0]} weights {names[1]}{'' if self.vec else ' unaligned'}"

    @property
    def threads(self) -> int:
        return THREADS[self.name]

    @property
    def source(self) -> str:
        """The file's name in `csrc/cuda`."""
        return f"{self.name}.cu"

    @property
    def macros(self) -> dict[str, str]:
        """What the source is compiled with."""
        hidden = HIDDEN[self.hidden]
        return {"HIDDEN": hidden, "WEIGHT": LOW_BIT.get(self.weight, hidden), "VEC": str(int(self.vec))}

    def cubin(self, arch: str) -> bytes:
        """The kernel compiled for `arch`, such as "sm_90"; from the cache if it is there. Needs no GPU.

        Raises CompileError with the compiler's log.
        """
        options = nvrtc.options(arch, self.macros)
        key = cache.key(nvrtc.sources(), self.source, *options, nvrtc.version())
        cubin = cache.read(key)
        if cubin is None:
            cubin = nvrtc.compile_source(self.source, arch, self.macros)
            cache.write(key, cubin)
        return cubin


def all_kernels() -> list[Kernel]:
    """Every kernel that a launch may ask for."""
    pairs = [(hidden, weight) for hidden in HIDDEN for weight in (hidden, *LOW_BIT)]
    return [
        Kernel(name, hidden, weight, vec)
        for name, (hidden, weight), vec in itertools.product(NAMES, pairs, (True, False))
    ]
