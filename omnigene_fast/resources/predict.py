"""What a launch must at least take, from its operands' sizes alone: a model, no measurement.

bytes     each operand is read or written once; of the experts' weights only what uniform routing of T tokens hits on
          average, E (1 - (1 - K / E)^T) experts
FLOPs     of the matrix products, padding left out; a router that has one token to a program multiplies by vectors
programs  those that have work: the grid without the spare tiles of a routing that is not uniform
waves     programs / (multiprocessors * blocks per multiprocessor)
floor     the larger of bytes / bandwidth and FLOPs / rate, at the data sheet's figures: dense bf16 for products that
          run on tensor cores, float32 without them for others
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from .cuda_kernels import CudaJob
from .experts import E, experts_hit
from .recorder import Job, Operand


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: bytes/s, FLOP/s dense."""

    name: str
    multiprocessors: int
    bandwidth: float
    tensor_rate: float
    float_rate: float


DEVICES = {
    80: Device("A100 SXM 80 GB", 108, 2.039e12, 312e12, 19.5e12),
    90: Device("H100 SXM", 132, 3.35e12, 989e12, 67e12),
    100: Device("B200", 148, 8.0e12, 2250e12, 75e12),
}


@dataclass(frozen=True)
class Prediction:
    """Of one launch; waves, floor (microseconds) and bound are None for an architecture without a device here."""

    bytes: float
    flops: float
    programs: int
    waves: float | None
    floor_us: float | None
    bound: str | None


def _rows(job: Job) -> int:
    return job.operands["order_ptr"].shape[0]


def _low_rank(job: Job) -> int:
    """The reduction's part in a low-rank update: its rank, or nothing."""
    return job.scalars["rank"] if "low_ptr" in job.operands else 0


_FLOPS: dict[str, Callable[[Job], int]] = {
    "_expert_up_fwd_kernel": lambda job: 4 * _rows(job) * job.scalars["I"] * (job.scalars["H"] + _low_rank(job)),
    "_expert_down_bwd_kernel": lambda job: 2 * _rows(job) * job.scalars["I"] * (job.scalars["H"] + _low_rank(job)),
    "_grouped_gemm_kernel": lambda job: 2 * _rows(job) * job.scalars["N"] * (job.scalars["K"] + _low_rank(job)),
    "_grouped_gram_kernel": lambda job: 2 * _rows(job) * job.scalars["M"] * job.scalars["N"],
    "_route_fwd_kernel": lambda job: 2 * job.scalars["T"] * job.scalars["E"] * job.scalars["H"],
}


def predict(job: Job | CudaJob, blocks: int, on_tensor_cores: bool) -> Prediction:
    """The model of one launch, of which a multiprocessor holds `blocks` blocks."""
    flops = job.flops if isinstance(job, CudaJob) else _FLOPS[job.function](job) if job.function in _FLOPS else 0
    over_experts = isinstance(job, CudaJob) or "tile_expert_ptr" in job.operands
    moved = sum(_moved(operand, job.tokens, over_experts) for operand in job.operands.values())
    programs = job.programs if isinstance(job, CudaJob) else _live_programs(job)
    device = DEVICES.get(job.arch)
    if device is None:
        return Prediction(moved, flops, programs, None, None, None)
    memory = moved / device.bandwidth
    compute = flops / (device.tensor_rate if on_tensor_cores else device.float_rate)
    waves = programs / (device.multiprocessors * blocks) if blocks else None
    bound = "memory" if memory >= compute else "compute"
    return Prediction(moved, flops, programs, waves, 1e6 * max(memory, compute), bound)


def _moved(operand: Operand, tokens: int, over_experts: bool) -> float:
    """Bytes of one operand; of weights, [E, ...], only those of the experts that are hit."""
    weights = over_experts and len(operand.shape) > 1 and operand.shape[0] == E
    return operand.bytes * (experts_hit(tokens) / E if weights else 1)


def _live_programs(job: Job) -> int:
    if "num_tiles" not in job.scalars or job.kernel.startswith("dispatch"):
        return job.programs
    hit = max(round(experts_hit(job.tokens)), 1)
    tiles = hit * ceil(_rows(job) / hit / job.constants["BLOCK_M"])
    return job.programs // job.scalars["num_tiles"] * tiles


def counted(job: Job | CudaJob) -> bool:
    """Whether the FLOPs of its products are known."""
    return isinstance(job, CudaJob) or job.function in _FLOPS
