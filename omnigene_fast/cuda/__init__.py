"""CUDA C++ kernels of `csrc/cuda`, compiled by NVRTC where they first run. So far: the decode path, T <= 16.

Importing this needs neither cuda.core nor a GPU; `unavailable` says what a launch would need. NVRTC needs no GPU and no
CUDA toolkit, so `all_kernels` and `Kernel.cubin` work wherever the package nvidia-cuda-nvrtc is installed.
"""

from .kernel import Kernel, all_kernels
from .launch import prepare, unavailable
from .nvrtc import CompileError

__all__ = ["CompileError", "Kernel", "all_kernels", "prepare", "unavailable"]
