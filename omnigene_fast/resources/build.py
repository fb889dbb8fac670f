"""Compiles recorded launches for GPUs that need not be there, and reads what came of them; cached by content."""

import hashlib
import importlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .._cache import cache_folder
from . import built as record
from . import cuda_kernels, sass
from .built import Built
from .cuda_kernels import CudaJob
from .recorder import Job

# Jobs that a process takes at a time: enough that the disassembler's start counts for little, few enough that all
# processes end together.
CHUNK = 6
_MAX_WORKERS = 16
# Which operands a GEMM's pipeline copies; the first fills BLOCK_M columns, the others BLOCK_N each.
_PIPELINED = {
    "_expert_up_fwd_kernel": ("hidden_ptr", "gate_up_ptr", "gate_up_ptr"),
    "_expert_down_bwd_kernel": ("grad_ptr", "down_ptr"),
    "_grouped_gemm_kernel": ("rows_ptr", "weight_ptr"),
    "_grouped_gram_kernel": ("left_ptr", "right_ptr"),
}
_DOT = re.compile(r"= tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")


def compile_job(job: Job) -> tuple[Any, bytes]:
    """Triton's compiled kernel and its cubin."""
    fn = getattr(importlib.import_module(job.module), job.function)
    target = GPUTarget("cuda", job.arch, 32)
    try:
        compiled = triton.compile(_source(fn, job), target=target, options=job.options)
    except Exception as error:
        raise RuntimeError(f"sm_{job.arch} {job.kernel} ({job.what}, {job.tile}): does not compile: {error}") from error
    return compiled, compiled.asm["cubin"]


def _source(fn: Any, job: Job) -> ASTSource:
    divisible = {(position,): [["tt.divisibility", size]] for position, size in job.attributes.items()}
    return ASTSource(fn, job.signature, job.constants, divisible)


def build(jobs: Sequence[Job]) -> list[Built]:
    """Compiles jobs of one architecture."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    compiled = [compile_job(job) for job in jobs]
    images = [sass.texts(cubin)[job.function] for job, (_, cubin) in zip(jobs, compiled, strict=True)]
    codes = sass.disassemble(images, jobs[0].arch)
    return [_read(job, *parts, code) for job, parts, code in zip(jobs, compiled, codes, strict=True)]


def _read(job: Job, compiled: Any, cubin: bytes, code: sass.Code) -> Built:
    usage = sass.usage(cubin)[job.function]
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", ptx)
    if entry is None or threads is None:
        raise RuntimeError(f"{job.kernel}: the PTX of triton {triton.__version__} has no entry with .reqntid.")
    kinds = {name: kind for name, kind in job.signature.items() if name.startswith("trace_")}
    return Built(
        threads=int(threads[1]),
        registers=usage.registers,
        stack=usage.stack + usage.local,
        spill=code.local_bytes(),
        shared=compiled.metadata.shared + usage.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_cores=code.tensor_cores(),
        load=code.load(),
        cubin_bytes=len(cubin),
        dots=[[int(m), int(n), int(k), element] for m, k, element, n in _DOT.findall(ttir)],
        wide_copies=len(re.findall(r"cp\.async\.\w+\.shared\.global[^\n]* 0x10,", ptx)),
        pipeline_copies=_pipeline_copies(job),
        parameters=entry[1].count(".param ") - 2,  # Triton appends two pointers of its own, to scratch memory
        trace=[kind for kind in kinds.values() if kind != "constexpr"],
        narrow_stores=len(re.findall(r"st\.global\.\w*(?:b8|b16)\b", ptx)),
        narrow_products=len(re.findall(r"arith\.muli .*: tensor<[0-9x]*xi32>", ttir)),
    )


def _pipeline_copies(job: Job) -> float:
    """16-byte copies per thread that fill the pipeline of a GEMM once, if every operand that no descriptor brings is
    copied so."""
    constants, stages = job.constants, job.options["num_stages"]
    if job.function not in _PIPELINED:
        return 0
    if constants.get("GATHER_LEFT") or constants.get("GATHER_RIGHT"):
        stages = (stages + 1) // 2  # the other half of the depth waits for the rows' numbers
    row_bytes = 0
    for number, name in enumerate(_PIPELINED[job.function]):
        operand = job.operands[name]
        if not operand.descriptor:
            row_bytes += constants["BLOCK_N" if number else "BLOCK_M"] * operand.itemsize
    return stages * row_bytes * constants["BLOCK_K"] / (16 * 32 * job.options["num_warps"])


def build_all(jobs: Sequence[Job | CudaJob], progress: Callable[[int], None] = lambda done: None) -> list[Built]:
    """Each job's resources, from the cache or by as many processes as there are cores."""
    keys = [_key(job) for job in jobs]
    built: dict[str, Built] = {}
    for key in keys:
        found = _load(key)
        if found is not None:
            built[key] = found
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in built}
    progress(len(jobs) - len(missing))
    chunks: list[list[tuple[str, Any]]] = []
    kinds = [(type(job), job.arch) for job in missing.values()]
    for kind in dict.fromkeys(kinds):
        todo = [item for item, of_kind in zip(missing.items(), kinds, strict=True) if of_kind == kind]
        chunks += [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    if chunks:
        workers = min(len(os.sched_getaffinity(0)), len(chunks), _MAX_WORKERS)
        with get_context("spawn").Pool(workers) as pool:
            for done in pool.imap_unordered(_build_chunk, chunks):
                built |= done
                progress(len(done))
    return [built[key] for key in keys]


def _build_chunk(chunk: list[tuple[str, Any]]) -> dict[str, Built]:
    """Of one kind and architecture."""
    keys, jobs = [key for key, _ in chunk], [job for _, job in chunk]
    results = cuda_kernels.build(jobs) if isinstance(jobs[0], CudaJob) else build(jobs)
    done = dict(zip(keys, results, strict=True))
    for key, result in done.items():
        _store(key, result)
    return done


def _key(job: Job | CudaJob) -> str:
    """Hash of all that the result depends on: the kernel's source and what it calls, the specialisation, the compiler
    and its switches, and the code that reads the result."""
    if isinstance(job, CudaJob):
        return hashlib.sha256(repr((job.key(), job.arch, _reader())).encode()).hexdigest()
    fn = getattr(importlib.import_module(job.module), job.function)
    switches = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("TRITON_", "PTXAS_")) and name not in ("TRITON_CACHE_DIR", "TRITON_HOME")
    }
    parts = (
        _source(fn, job).hash(),
        *job.compiled[3:],
        job.arch,
        triton.__version__,
        sorted(switches.items()),
        _reader(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _reader() -> bytes:
    return b"".join(Path(file).read_bytes() for file in (__file__, record.__file__, sass.__file__))


def _load(key: str) -> Built | None:
    try:
        return Built(**json.loads((cache_folder("resources") / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _store(key: str, result: Built) -> None:
    """Written beside and renamed, so that no reader sees half of it. A cache that cannot be written is no error."""
    try:
        folder = cache_folder("resources")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(asdict(result), file)
        os.replace(file.name, folder / f"{key}.json")
    except OSError:
        pass
