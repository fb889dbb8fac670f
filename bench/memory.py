"""Peak memory of one call, beyond what was in use before it.

On a GPU: torch's allocator, whose peak is reset before the call.

On the CPU: the growth of the process' resident high-water mark (VmHWM), reset before the call by writing 5 to
/proc/self/clear_refs. The allocator's own reports (torch.profiler) and a dispatch mode would see tensors alone; this
also sees what oneDNN copies into its own layout and the scratch of C++ kernels, ours among them. It counts pages that
were touched, to the page (4 KiB, or 2 MiB where the system gives huge ones): memory that is reserved and never written
is not memory used. Blocks that malloc, or our C++ module, keeps from earlier calls would hide the growth and are
returned first. A forked child would do the same without the reset, but OpenMP's threads do not survive a fork.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from omnigene_fast.backends import cpu

_PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its peak, its result included; None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_blocks()
    try:
        before = _kilobytes("VmRSS")
        (_PROCESS / "clear_refs").write_text("5")
    except (OSError, KeyError):  # not Linux, or a sandbox that does not let a process reset its own mark
        return None
    result = call()
    peak = _kilobytes("VmHWM")
    del result
    return max(0, peak - before) * 1024


def _kilobytes(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def _return_free_blocks() -> None:
    if cpu.unavailable(torch.device("cpu")) is None:
        cpu.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
