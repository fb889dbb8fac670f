"""What a compiler made of a kernel."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Built:
    """Resources and machine code of one kernel. Bytes are per thread for stack and spill, per block for shared."""

    threads: int
    registers: int
    stack: int
    spill: int  # bytes that instructions of local memory store and load
    shared: int
    tensor_columns: int  # of tensor memory, compute capability 10
    tensor_cores: dict[str, int]
    load: str  # the widest from global memory
    cubin_bytes: int
    dots: list[list[Any]] = field(default_factory=list)  # [M, N, K, element type] of each product in the source
    wide_copies: int = 0  # 16-byte asynchronous copies in the PTX
    pipeline_copies: float = 0  # of those, how many fill the pipeline once if every operand is copied so
    parameters: int = 0
    trace: list[str] = field(default_factory=list)
    narrow_stores: int = 0  # of 1 and 2 bytes
    narrow_products: int = 0  # of tensors of 32-bit integers
