"""The report: one row per kernel, configuration and architecture, and what of it is an offence."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import cuda_kernels
from .build import build_all
from .built import Built
from .cuda_kernels import CudaJob
from .launches import jobs
from .occupancy import MULTIPROCESSORS, blocks_per_multiprocessor
from .predict import Prediction, counted, predict
from .recorder import Job

# The tensor cores' instruction for 16-bit operands, below 64 rows of the product and from there on.
_NARROW, _NARROW_ROWS = "HMMA", 64
_WIDE = {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}
_FLOATS = ("f32", "f64")


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    arch: int
    language: str  # triton or cuda
    kernel: str
    what: str
    tile: str
    tokens: int
    warps: int
    stages: int | None
    aligned: bool
    shared_limit: int
    blocks: int  # that a multiprocessor holds at once
    expected: tuple[str, ...]  # instructions of the tensor cores that its products call for
    built: Built
    prediction: Prediction | None

    @property
    def name(self) -> str:
        return f"sm_{self.arch} {self.kernel} ({self.what}; {self.tile or 'no tile'}, {self.warps} warps)"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it apart from every other row of its architecture."""
        return configuration(self.kernel, self.what, self.tile, self.tokens, self.warps, self.stages)

    def flat(self) -> dict[str, Any]:
        """One level of names to values, for JSON."""
        own = {name: value for name, value in asdict(self).items() if name not in ("built", "prediction")}
        predicted = asdict(self.prediction) if self.prediction else {}
        return own | asdict(self.built) | {f"predicted_{name}": value for name, value in predicted.items()}


def configuration(kernel: str, what: str, tile: str, tokens: int, warps: int, stages: int | None) -> tuple[str, ...]:
    return kernel, what, tile, str(tokens), str(warps), "" if stages is None else str(stages)


def rows(found: Sequence[Job | CudaJob], progress: Callable[[int], None] = lambda done: None) -> list[Row]:
    """Compiles the jobs and reports each."""
    return [row(job, built) for job, built in zip(found, build_all(found, progress), strict=True)]


def find(arches: Sequence[int], kernels: Sequence[str] = ()) -> list[Job | CudaJob]:
    """The jobs of these architectures, of all kernels or of those whose name contains one of `kernels`."""
    for arch in arches:
        if arch not in MULTIPROCESSORS:
            raise ValueError(f"--arch: expected {', '.join(map(str, MULTIPROCESSORS))}, got {arch}.")
    every: list[Job | CudaJob] = []
    for arch in arches:
        every += jobs(arch)
        every += cuda_kernels.jobs(arch)
    found = [job for job in every if not kernels or any(name in job.kernel for name in kernels)]
    if not found:
        known = ", ".join(sorted({job.kernel for job in every}))
        raise ValueError(f"--kernel: expected part of one of {known}, got {', '.join(kernels)}.")
    return found


def row(job: Job | CudaJob, built: Built) -> Row:
    blocks = blocks_per_multiprocessor(job.arch, built.registers, built.threads, built.shared, built.tensor_columns)
    triton = job if isinstance(job, Job) else None
    return Row(
        arch=job.arch,
        language="triton" if triton else "cuda",
        kernel=job.kernel,
        what=job.what,
        tile=triton.tile if triton else "",
        tokens=job.tokens,
        warps=built.threads // 32,
        stages=triton.options["num_stages"] if triton else None,
        aligned=triton is not None and triton.aligned,
        shared_limit=MULTIPROCESSORS[job.arch].shared_block,
        blocks=blocks,
        expected=expected_instructions(triton, built.dots) if triton else (),
        built=built,
        prediction=predict(job, blocks, bool(built.tensor_cores)) if counted(job) or not built.dots else None,
    )


def expected_instructions(job: Job, dots: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """The instructions that a job's products [M, N, K, element type] call for: each side of 64 rows has its own.

    A product of 16-bit operands calls for them even if the source widens it to float32, or spells it without tl.dot.
    """
    wanted = set()
    for rows_of_product, _, _, element in dots:
        if job.half or element not in _FLOATS:
            wanted.add(_WIDE.get(job.arch, _NARROW) if rows_of_product >= _NARROW_ROWS else _NARROW)
    if job.half and counted(job) and not dots:
        wanted.add(_NARROW)
    return tuple(sorted(wanted))


def offences(found: Sequence[Row]) -> list[str]:
    """A sentence for everything that must not be: spills, products without tensor cores, what cannot launch."""
    sentences = []
    for each in found:
        built = each.built
        if built.stack or built.spill:
            sentences.append(
                f"{each.name} spills: {built.stack} bytes of stack, {built.spill} bytes by local loads and stores;"
                " take a smaller tile or more warps."
            )
        missing = [name for name in each.expected if name not in built.tensor_cores]
        if missing:
            got = ", ".join(built.tensor_cores) or "none"
            sentences.append(
                f"{each.name} multiplies without the tensor cores: expected {' and '.join(missing)}, got {got}."
            )
        if built.tensor_cores and not each.expected and each.language == "triton":
            sentences.append(
                f"{each.name} multiplies float32 on the tensor cores ({', '.join(built.tensor_cores)}), which rounds;"
                " use dot of omnigene_fast/kernels/arithmetic.py."
            )
        if each.prediction is None:
            sentences.append(
                f"{each.name} has matrix products but no count of FLOPs; add one to omnigene_fast/resources/predict.py."
            )
        if built.shared > each.shared_limit:
            sentences.append(
                f"{each.name} cannot launch: it takes {built.shared:,} bytes of shared memory, a block may have"
                f" {each.shared_limit:,}; take fewer stages."
            )
        elif each.blocks == 0:
            sentences.append(
                f"{each.name} cannot launch: {built.threads} threads with {built.registers} registers each do not fit"
                " on a multiprocessor; take fewer warps."
            )
    return sentences
