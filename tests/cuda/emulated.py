"""Builds the decode kernels for the CPU and runs launches in the emulator of emulator.h, in place of a GPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnigene_fast.cuda import nvrtc
from omnigene_fast.cuda.launch import Launch

HERE = Path(__file__).parent
Edit = tuple[str, str, str]  # file of csrc/cuda, text in it, what to put in its place

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def build(hidden: str, weight: str, vec: str, edit: Edit | None = None) -> ctypes.CDLL:
    """The kernels with these types as a library; with `edit`, with a mistake put in."""
    folder = Path(tempfile.mkdtemp(prefix="omnigene-fast-emulated-"))
    try:
        for path in [*nvrtc.SOURCES.iterdir(), HERE / "emulator.h", HERE / "emulated.cpp"]:
            text = path.read_text()
            if edit is not None and path.name == edit[0]:
                assert edit[1] in text, f"{edit[1]!r} does not occur in {edit[0]}"
                text = text.replace(edit[1], edit[2])
            (folder / path.name).write_text(text)
        library = folder / "emulated.so"
        macros = [f"-D{name}" for name in ("OMNIGENE_EMULATOR", f"HIDDEN={hidden}", f"WEIGHT={weight}", f"VEC={vec}")]
        command = [
            "g++",
            "-O1",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-unknown-pragmas",
        ]
        result = subprocess.run(
            [*command, *macros, "emulated.cpp", "-o", library], cwd=folder, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-4000:]
        loaded = ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)
    loaded.run.restype = ctypes.c_char_p
    return loaded


def emulate(seed: int = 0, edit: Edit | None = None, batches: list[Launch] | None = None) -> Callable:
    """What `decode.expert_mlp` takes as `run`: blocks and threads in an order drawn from `seed` (0: ascending).

    The last argument of a launch that is a tensor is its output; `batches` collects the launches.
    """

    def run(device: torch.device, launches: Iterable[Launch]) -> None:
        written: list[Tensor] = []
        for launch in launches:
            macros = launch.kernel.macros
            library = build(macros["HIDDEN"], macros["WEIGHT"], macros["VEC"], edit)
            tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
            ranges = []
            for tensor in tensors:
                bytes_held = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                kind = 1 if tensor is tensors[-1] else 2 if any(tensor is x for x in written) else 0
                ranges += [begin, begin + bytes_held * tensor.element_size(), kind]
            words = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in launch.arguments]
            error = library.run(
                launch.kernel.name.encode(),
                *launch.grid,
                launch.kernel.threads,
                seed,
                (ctypes.c_int64 * len(words))(*words),
                len(words),
                (ctypes.c_int64 * len(ranges))(*ranges),
                len(tensors),
            )
            if error is not None:
                raise RuntimeError(f"{launch.kernel}: {error.decode()}")
            written.append(tensors[-1])
            if batches is not None:
                batches.append(launch)

    return run
