"""What this installation runs on: device, backends, versions, and what each missing piece would need."""

import datetime
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import backends

PACKAGES = (
    "omnigene-fast",
    "torch",
    "transformers",
    "triton",
    "cuda-core",
    "nvidia-cuda-nvrtc",
    "numpy",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "bitsandbytes",
    "pytest-benchmark",
    "matplotlib",
    "pyarrow",
    "duckdb",
    "pandas",
    "plotly",
    "scipy",
    "rdkit",
    "dask",
    "distributed",
)
PROGRAMS = {"mmseqs": "mmseqs2", "diamond": "diamond-aligner"}  # of the examples, with their Debian packages
VARIABLES = (
    "OMNIGENE_FAST_CACHE",
    "OMNIGENE_FAST_CPU_ISA",
    "OMNIGENE_FAST_CHECK_IDS",
    "OMNIGENE_FAST_DECODE",
    "OMNIGENE_FAST_TUNED",
    "TRITON_INTERPRET",
)


def report() -> str:
    """The text of `omnigene-fast info`."""
    lines = [
        f"omnigene-fast {package_version('omnigene-fast') or 'from an uninstalled checkout'}",
        "",
        *_section(
            "device",
            [("cpu", f"{cpu_name()}, {_threads()}"), ("memory", _memory()), ("gpu", _gpu()), ("tiles", _tiles())],
        ),
        *_section(
            "backends", [*((name, _backend(name)) for name in ("cpu", "triton", "reference")), ("decode", _decode())]
        ),
        *_section("traces", [("browser", _browser())]),
        *_section("examples", [(name, program(name)) for name in PROGRAMS]),
        *_section("versions", [("python", platform.python_version()), *((n, _package(n)) for n in PACKAGES[1:])]),
        *_section("environment", [(name, os.environ.get(name, "not set")) for name in VARIABLES]),
    ]
    return "\n".join(lines).rstrip()


def busy() -> str | None:
    """A remark if other work keeps this machine's cores busy, so that times and their ratios mislead; to ask before."""
    try:
        load = os.getloadavg()[0]  # of the last minute
    except (AttributeError, OSError):  # not on this system
        return None
    cores = os.cpu_count() or 1
    if load < max(0.5, 0.25 * cores):
        return None
    return (
        f"this machine was busy (load {load:.1f} on {cores} cores before this began): times and speed-ups are not those"
        " of a quiet one, on which they should be measured again"
    )


def trace_report(path: Path) -> str:
    """The text of `omnigene-fast info RUN`: what a router trace holds."""
    from .tracing.run import open_trace

    run = open_trace(path)
    documents = run.documents
    shape = f"{len(run.layers)} ({_ranges(run.layers)}), {run.num_experts} experts, top-{run.top_k}"
    size = sum(segment.part.size + segment.docs.size for segment in run.segments)
    known = ("model", "model_class", "config_hash", "dtype", "quantization", "numerics", "tokenizer", "created")
    lines = [
        f"router trace {path}",
        "",
        *_section(
            "run",
            [
                ("tokens", f"{int(documents['n_tokens'].sum()):,}"),
                ("dropped", f"{run.dropped:,}"),
                ("documents", f"{len(documents):,}"),
                ("layers", shape),
                ("kept", ", ".join(("counts", *run.record))),
                ("files", f"{len(run.segments)} segments, {size / 1e6:,.1f} MB"),
            ],
        ),
        *_section("origin", [(name, str(run.meta[name])) for name in known if run.meta.get(name) is not None]),
    ]
    for name in run.labels:
        tokens = documents.groupby(documents[name].fillna("(none)"))["n_tokens"].agg(["size", "sum"])
        rows = [
            (str(value), f"{row['size']:>7,} documents {row['sum']:>11,} tokens") for value, row in tokens.iterrows()
        ]
        lines += _section(f"label {name}", rows[:40] + ([("...", f"{len(rows) - 40} more")] if len(rows) > 40 else []))
    return "\n".join(lines).rstrip()


def _ranges(numbers: list[int]) -> str:
    """Rising integers in short: 0-29, or 1-3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def environment(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> dict[str, Any]:
    """The fields that every row of a benchmark carries about where, when and with what it was measured."""
    return {
        "device": device_name(device),
        "isa": isa() if device.type == "cpu" else None,
        "backend": backend_in_use(device, dtype, backend),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name.replace("-", "_"): package_version(name) for name in PACKAGES[:4]},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device) -> str:
    """A file name for results measured on `device`, such as "cpu-amd-epyc-zen-5-2c"."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    words = re.sub(r"\((R|TM)\)|@.*", " ", device_name(device), flags=re.IGNORECASE)
    words = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{kind}-{words}" + (f"-{torch.get_num_threads()}c" if kind == "cpu" else "")


def cpu_name() -> str:
    """The processor's name, with AMD's core where the name does not say it (virtual machines report "AMD EPYC")."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        pass
    name = re.sub(
        r"\s+\d+-Core Processor", "", fields.get("model name", "") or platform.processor() or platform.machine()
    )
    family = fields.get("cpu family") if fields.get("vendor_id") == "AuthenticAMD" else None
    if family == "25":
        return f"{name} (Zen 4)" if "avx512f" in fields.get("flags", "") else f"{name} (Zen 3)"
    return {"23": f"{name} (Zen 2)", "26": f"{name} (Zen 5)"}.get(family or "", name)


def isa() -> str | None:
    """The instruction set whose C++ kernels run, such as "avx512_bf16"; None without the C++ module."""
    cpu = backends.load("cpu")
    return cpu.isa() if cpu.unavailable(torch.device("cpu")) is None else None  # type: ignore[attr-defined]


def backend_in_use(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """The backend that serves tensors of `dtype` on `device`: "cpu", "triton" or "reference"."""
    chosen: Any = backends.select(backend, device, dtype)
    return "reference" if chosen is None else chosen.__name__.rpartition(".")[2]


def package_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {text}" for name, text in rows), ""]


def _package(name: str) -> str:
    found = package_version(name)
    if found is None:
        return f"not installed (pip install {name})"
    return f"{found}; {refused}" if name == "peft" and (refused := peft_refused()) is not None else found


def peft_refused() -> str | None:
    """None if transformers works with the installed PEFT in `model.add_adapter`, else why not; PEFT's own calls do."""
    from transformers.integrations import peft

    least = getattr(peft, "MIN_PEFT_VERSION", None)
    if package_version("peft") is None or least is None:
        return None
    try:
        peft.check_peft_version(min_version=least)
    except ValueError:
        return (
            f"transformers {package_version('transformers')} asks for peft {least} in model.add_adapter;"
            " peft.get_peft_model needs no newer one."
        )
    return None


def browser() -> str | None:
    """Path of a Chromium that can show a report without a screen; only the tests need one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def _browser() -> str:
    return browser() or "none found: the test that opens a report in one is skipped (apt-get install chromium)"


def program(name: str) -> str:
    """Path of one of PROGRAMS, or what goes without it."""
    missing = f"not found: examples/omnigene/homology.py leaves it out on request (apt-get install {PROGRAMS[name]})"
    return shutil.which(name) or missing


def _threads() -> str:
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"


def _memory() -> str:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return "the system does not say"
    return f"{total:.1f} GB, {free:.1f} GB available"


def _gpu() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 1e9:.0f} GB"
    if torch.version.cuda is None:
        return f"none in use: torch {torch.__version__} is built without CUDA; a GPU needs a CUDA build of torch"
    return "none found: torch has CUDA but sees no NVIDIA GPU (check `nvidia-smi`)"


def _tiles() -> str:
    if not torch.cuda.is_available() or package_version("triton") is None:
        return "none in use: they are for a GPU with Triton"
    major, minor = torch.cuda.get_device_capability(0)
    return tiles_in_use(10 * major + minor, torch.cuda.get_device_name(0))


def tiles_in_use(arch: int, device: str) -> str:
    """Which table the Triton kernels of the experts take their tiles from on such a GPU."""
    from .kernels.tiles import tables_of

    table = tables_of(arch, device)[0]
    if table.source == "measured":
        return f"{table.path}, measured on this kind of GPU ({table.header['date']})"
    served = f"for sm_{arch}" if arch in table.arch else f"for sm_{table.arch[0]}, no table is for sm_{arch}"
    return f"{table.path}, predicted {served}; `omnigene-fast tune` measures this GPU"


def _backend(name: str) -> str:
    if name == "reference":
        return "ready: plain PyTorch, every device and dtype, slow"
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    backend: Any = backends.load(name)
    reason = backend.unavailable(device)
    if reason is not None:
        return f"not available: {reason}"
    return f"ready: C++ kernels for {isa()}" if name == "cpu" else f"ready: Triton kernels on {device_name(device)}"


def _decode() -> str:
    """The CUDA C++ kernels that serve up to 16 tokens in the place of the Triton backend's grouped GEMM."""
    from .cuda import decode, nvrtc, unavailable

    if not decode.enabled():
        return "turned off by OMNIGENE_FAST_DECODE=0: Triton serves every number of tokens"
    if (reason := unavailable()) is not None:
        return f"not available, so that Triton serves every number of tokens: {reason}"
    compiler = f"CUDA C++ kernels for T <= {decode.MAX_TOKENS}, compiled by NVRTC {nvrtc.version()}"
    if not torch.cuda.is_available():
        return f"{compiler}, and no GPU to run them"
    reason = unavailable(torch.device("cuda"))
    return f"ready: {compiler}" if reason is None else f"not available, so that Triton serves every T: {reason}"
