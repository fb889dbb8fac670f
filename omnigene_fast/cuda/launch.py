"""Loads and launches kernels on torch's current stream, through cuda.core."""

import functools
import importlib.util
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import nvrtc
from .kernel import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable

INSTALL = "install it with `pip install 'omnigene-fast[cuda]'`"


class Launch(NamedTuple):
    """One kernel launch; the arguments are pointers (tensors, None for null) and 64-bit integers."""

    kernel: Kernel
    grid: tuple[int, int]
    arguments: tuple[Tensor | int | None, ...]
    after_previous: bool = False  # may start while the kernel before it ends, and waits for that itself


def unavailable(device: torch.device | None = None) -> str | None:
    """None if kernels compile here and, where `device` is given, run on it; else one sentence with the way out."""
    return _unavailable(device.index if device is not None else None, device.type if device is not None else "")


@functools.cache
def _unavailable(index: int | None, device_type: str) -> str | None:
    for name in ("cuda.core", "cuda.bindings"):
        if not _installed(name):
            return f"the package {name.replace('.', '-')} is not installed; {INSTALL}."
    try:
        version, newest = nvrtc.version(), nvrtc.newest_arch()
    except Exception as error:  # each loader has its own
        return f"NVRTC does not load ({type(error).__name__}: {str(error).partition(chr(10))[0]}); {INSTALL}."
    if not device_type:
        return None
    if device_type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return "the CUDA C++ kernels need an NVIDIA GPU, and torch finds none; the CPU runs backend='cpu'."
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"the GPU has compute capability {major}.{minor}, and the CUDA C++ kernels need 8.0; Triton's do as well."
        )
    if 10 * major + minor > newest:
        return f"NVRTC {version} does not know compute capability {major}.{minor}; `pip install -U nvidia-cuda-nvrtc`."
    from cuda.bindings import driver

    status, supported = driver.cuDriverGetVersion()
    if status == driver.CUresult.CUDA_SUCCESS and supported // 1000 < int(version.split(".")[0]):
        return (
            f"the driver supports CUDA {supported // 1000}.{supported % 1000 // 10} and cannot load what NVRTC"
            f" {version} compiles; update the driver, or install cuda-bindings and NVRTC of the driver's CUDA version."
        )
    return None


def prepare(device: torch.device, kernels: "Iterable[Kernel]") -> None:
    """Compile and load `kernels` on `device`: before a CUDA graph's capture, which allows neither."""
    for kernel in kernels:
        _load(kernel, device.index if device.index is not None else torch.cuda.current_device())


def launch(device: torch.device, launches: "Iterable[Launch]") -> None:
    """Put `launches` on torch's current stream of `device`, which is torch's current device."""
    from cuda import core

    index = device.index if device.index is not None else torch.cuda.current_device()
    ready: set[int] = _here.__dict__.setdefault("ready", set())
    if index not in ready:  # cuda.core's devices belong to a thread, and a thread may never have called CUDA
        core.Device(index).set_current()
        ready.add(index)
    stream = _stream(index, torch.cuda.current_stream(device).cuda_stream)
    for item in launches:
        arguments = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in item.arguments]
        config = _config(item.grid, item.kernel.threads, item.after_previous and _compute_major(index) >= 9)
        core.launch(stream, config, _load(item.kernel, index), *arguments)


_here = threading.local()


class _TorchStream:
    """What cuda.core asks of a stream that is not its own."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@functools.lru_cache(maxsize=64)
def _stream(index: int, handle: int) -> Any:
    """A stream of torch's, which torch keeps for good, as cuda.core sees it."""
    from cuda.core import Device

    return Device(index).create_stream(_TorchStream(handle))


@functools.lru_cache(maxsize=256)
def _config(grid: tuple[int, int], threads: int, after_previous: bool) -> Any:
    from cuda.core import LaunchConfig

    if after_previous and hasattr(LaunchConfig, "programmatic_stream_serialization"):  # from cuda.core 1.2 on
        return LaunchConfig(grid=grid, block=threads, programmatic_stream_serialization=True)
    return LaunchConfig(grid=grid, block=threads)


@functools.cache
def _compute_major(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


_loading = threading.Lock()
_loaded: dict[tuple[Kernel, int], Any] = {}


def _load(kernel: Kernel, index: int) -> Any:
    found = _loaded.get((kernel, index))
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} is not loaded yet, and a CUDA graph's capture cannot load it; run the model once before the"
            " capture (as torch.cuda.graph's warm-up does), or call omnigene_fast.cuda.decode.prepare."
        )
    from cuda.core import ObjectCode

    major, minor = torch.cuda.get_device_capability(index)
    with _loading:
        if (kernel, index) not in _loaded:
            code = ObjectCode.from_cubin(kernel.cubin(f"sm_{major}{minor}"), name=str(kernel))
            _loaded[kernel, index] = code.get_kernel(kernel.name)
        return _loaded[kernel, index]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
