"""Compiles the sources of `csrc/cuda` with NVRTC, through cuda.core. Needs no GPU, no driver and no toolkit."""

import functools
from pathlib import Path

# In a checkout a link to csrc/cuda, in an installed package a folder with copies.
SOURCES = Path(__file__).parent / "src"


class CompileError(RuntimeError):
    """NVRTC refused a source; the message ends with its log."""


@functools.cache
def sources() -> bytes:
    """Every file that a compilation can include, one after the other."""
    paths = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")])
    return b"".join(path.name.encode() + b"\0" + path.read_bytes() + b"\0" for path in paths)


@functools.cache
def version() -> str:
    """NVRTC's version, such as "13.0"."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion failed: {error}.")
    return f"{major}.{minor}"


@functools.cache
def newest_arch() -> int:
    """The largest compute capability that this NVRTC compiles for, such as 120."""
    from cuda.bindings import nvrtc

    error, count = nvrtc.nvrtcGetNumSupportedArchs()
    error, archs = nvrtc.nvrtcGetSupportedArchs() if count else (error, [0])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcGetSupportedArchs failed: {error}.")
    return max(archs)


def options(arch: str, macros: dict[str, str]) -> list[str]:
    """What `compile_source` passes on, as text; part of a cubin's key."""
    return [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]


def compile_source(name: str, arch: str, macros: dict[str, str]) -> bytes:
    """The cubin of the file `name` of `csrc/cuda` for `arch`. Raises CompileError with the compiler's log."""
    from cuda.core import Program, ProgramOptions

    path = SOURCES / name
    settings = ProgramOptions(
        name=name, arch=arch, std="c++17", define_macro=list(macros.items()), include_path=str(SOURCES)
    )
    try:
        code = Program(path.read_text(), "c++", settings).compile("cubin").code
    except Exception as error:  # NVRTCError of cuda.core, which has no public name
        if type(error).__name__ != "NVRTCError":
            raise
        raise CompileError(
            f"csrc/cuda/{name} does not compile for {arch} with NVRTC {version()} and"
            f" {' '.join(options(arch, macros)[2:])}; set OMNIGENE_FAST_DECODE=0 to run the Triton kernels instead."
            f" {error}"
        ) from error
    return bytes(code)
