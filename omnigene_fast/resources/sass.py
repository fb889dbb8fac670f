"""What a cubin holds: resources by `cuobjdump`, machine instructions by `nvdisasm`, both from Triton's wheel.

`nvdisasm` takes a quarter of a second to start, longer than it needs for most kernels. So the code of many cubins goes
to it as one raw image, and the instructions' offsets tell whose they are.
"""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_INSTRUCTION = re.compile(rb"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{ *)?(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"Function ([\w$]+):\s*\n\s*(REG:[^\n]*)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: how often each instruction occurs, with its modifiers."""

    instructions: Counter[str] = field(default_factory=Counter)

    def tensor_cores(self) -> dict[str, int]:
        """Instructions of the tensor cores, without modifiers: HMMA, HGMMA, UTCHMMA, ..."""
        found: Counter[str] = Counter()
        for name, count in self.instructions.items():
            base = name.split(".")[0]
            if base.endswith("MMA"):
                found[base] += count
        return dict(sorted(found.items()))

    def load(self) -> str:
        """The widest load from global memory; "TMA" where tiles or runs of bytes are copied by the TMA unit."""
        names = [
            (_width(name), name.split(".")[0]) for name in self.instructions if name.startswith(("LDG.", "LDGSTS."))
        ]
        parts = []
        if any(name.startswith(("UTMALDG", "UBLKCP")) for name in self.instructions):
            parts.append("TMA")
        if names:
            width, base = max(names)
            parts.append(f"{base} {8 * width}")
        return " + ".join(parts)

    def local_bytes(self) -> int:
        """Bytes that the instructions of local memory store and load, each counted once, as ptxas counts its spills."""
        return sum(_width(name) * n for name, n in self.instructions.items() if name.split(".")[0] in ("STL", "LDL"))


@dataclass(frozen=True)
class Usage:
    """What a kernel is allotted: registers per thread; bytes of stack per thread, of static shared memory per block."""

    registers: int
    stack: int
    local: int
    shared: int


def _width(name: str) -> int:
    """Bytes per thread of a load or store with these modifiers."""
    return max((_WIDTHS[part] for part in name.split(".")[1:] if part in _WIDTHS), default=4)


def tool(name: str) -> Path:
    """One of the CUDA tools in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"expected {name} in Triton's wheel at {path}; reinstall triton.")
    return path


@cache
def tool_version(name: str) -> str:
    text = subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV([\d.]+)", text)
    return found[1] if found else text.strip().splitlines()[-1]


def usage(cubin: bytes) -> dict[str, Usage]:
    """Resources of each kernel in a cubin, by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for name, line in _USAGE.findall(text):
        fields = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        # From compute capability 9.0 on, SHARED holds the kilobyte that the driver reserves in every block.
        reserved = 1024 if fields["SHARED"] >= 1024 and _reserves(cubin) else 0
        kernels[name] = Usage(fields["REG"], fields["STACK"], fields["LOCAL"], fields["SHARED"] - reserved)
    return kernels


def _reserves(cubin: bytes) -> bool:
    return b".nv.shared.reserved" in cubin


def texts(cubin: bytes) -> dict[str, bytes]:
    """The code of each kernel in a cubin, an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names_at = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    names = sections[names_at][4]
    found = {}
    for name_at, _, _, _, offset, size in sections:
        name = cubin[names + name_at : cubin.index(b"\0", names + name_at)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[offset : offset + size]
    return found


def disassemble(images: Sequence[bytes], arch: int) -> list[Code]:
    """The instructions of each of the kernels' code, which must be for the same architecture."""
    if not images:
        return []
    starts = [0]
    for image in images:
        starts.append(starts[-1] + len(image))
    suffix = "a" if arch >= 90 else ""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(images))
        file.flush()
        command = [str(tool("nvdisasm")), "--binary", f"SM{arch}{suffix}", file.name]
        text = subprocess.run(command, capture_output=True, check=True).stdout
    codes = [Code() for _ in images]
    for offset, name in _INSTRUCTION.findall(text):
        codes[bisect_right(starts, int(offset, 16)) - 1].instructions[name.decode()] += 1
    for image, code in zip(images, codes, strict=True):
        if sum(code.instructions.values()) * 16 != len(image):
            raise RuntimeError(
                f"nvdisasm: expected {len(image) // 16} instructions of sm_{arch},"
                f" got {sum(code.instructions.values())}; the CUDA tools of this Triton print another format."
            )
    return codes
