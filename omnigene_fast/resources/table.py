"""The report as text: a table for the console, JSON, and the markdown of docs/kernels.md."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from . import sass
from .predict import DEVICES
from .report import Row, configuration

HEADERS = (
    "launch",
    "tile",
    "warps",
    "stages",
    "T",
    "registers",
    "spill",
    "shared KB",
    "blocks/SM",
    "tensor cores",
    "load",
    "cubin KB",
    "MB",
    "GFLOP",
    "waves",
    "floor µs",
)
_LEGEND = (
    (
        "launch",
        "role (r= is the rank of a low-rank update) and dtype of the operands; odd: sizes one less than Gemma-4's,"
        " rows that are not 16-byte aligned; uneven: 16 more, aligned but no multiple of the tile",
    ),
    ("tile", "BLOCK_M x BLOCK_N x BLOCK_K of a GEMM; tokens, experts and columns of other kernels"),
    (
        "T",
        "tokens that the last four columns are for: the most of 1, 4, 16, 64, 256, 512, 1024, 4096 that the tile"
        " serves; for a tile of another I than Gemma-4's, as many as fill one tile per expert",
    ),
    ("registers", "per thread"),
    ("spill", "bytes that local loads and stores in the machine code move, as ptxas counts spills; and the stack"),
    ("shared KB", "per block, dynamic and static, and its share of what a block may have"),
    ("blocks/SM", "blocks that a multiprocessor holds at once, by registers, shared memory, warps and tensor memory"),
    ("tensor cores", "their instructions in the machine code, each place counted once"),
    ("load", "widest load from global memory, in bits; LDGSTS copies to shared memory, TMA by descriptor"),
    ("MB, GFLOP", "what must at least be moved, each operand once, and multiplied, padding left out; uniform routing"),
    ("waves", "programs that have work / (multiprocessors x blocks/SM)"),
    ("floor µs", "the larger of MB / bandwidth (m) and GFLOP / rate (c), at the data sheet's figures"),
)


def cells(row: Row) -> tuple[str, ...]:
    """One row's texts, as HEADERS."""
    built, predicted = row.built, row.prediction
    share = f"{built.shared / 1024:.1f} ({100 * built.shared / row.shared_limit:.0f} %)"
    spill = str(built.spill) + (f" + {built.stack} stack" if built.stack else "")
    blank = "-"
    moved = gflop = waves = floor = blank
    if predicted is not None:
        moved = f"{predicted.bytes / 1e6:,.4g}" if predicted.bytes < 1e9 else f"{predicted.bytes / 1e6:,.0f}"
        gflop = _short(predicted.flops / 1e9) if predicted.flops else blank
        waves = blank if predicted.waves is None else f"{predicted.waves:.2f}"
        if predicted.floor_us is not None and predicted.bound is not None:
            floor = f"{_short(predicted.floor_us)} {predicted.bound[0]}"
    return (
        row.what or blank,
        row.tile or blank,
        str(row.warps),
        blank if row.stages is None else str(row.stages),
        str(row.tokens),
        str(built.registers),
        spill,
        share if built.shared else "0",
        str(row.blocks),
        " ".join(f"{name} {count}" for name, count in built.tensor_cores.items()) or blank,
        built.load or blank,
        f"{built.cubin_bytes / 1024:.0f}",
        moved,
        gflop,
        waves,
        floor,
    )


def _short(value: float) -> str:
    """Three figures, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def console(rows: Sequence[Row]) -> str:
    """Aligned columns, a block per architecture and kernel."""
    blocks = []
    for (arch, language, kernel), group in _grouped(rows):
        lines = [HEADERS, *(cells(row) for row in group)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
        body = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        blocks.append("\n".join([f"sm_{arch}  {kernel}  ({language})", *("  " + line.rstrip() for line in body)]))
    return "\n\n".join([*blocks, summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    """One line per architecture."""
    lines = []
    for arch, group in groupby(rows, key=lambda row: row.arch):
        found = list(group)
        widest = max(found, key=lambda row: row.built.registers)
        spills = sum(bool(row.built.spill or row.built.stack) for row in found)
        lines.append(
            f"sm_{arch}: {len({row.kernel for row in found})} kernels in {len(found)} configurations,"
            f" {spills or 'none'} with spills; at most {widest.built.registers} registers ({widest.kernel}),"
            f" {max(row.built.shared for row in found) / 1024:.0f} of {found[0].shared_limit / 1024:.0f} KB of shared"
            " memory"
        )
    return "\n".join(lines)


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps([row.flat() for row in rows], indent=1) + "\n"


def toolchain() -> dict[str, str]:
    """Versions that the numbers depend on."""
    import triton

    versions = {"triton": triton.__version__, "ptxas": sass.tool_version("ptxas")}
    if (sass.tool("ptxas").parent / "ptxas-blackwell").exists():
        versions["ptxas for sm_100"] = sass.tool_version("ptxas-blackwell")
    return versions | {"cuobjdump": sass.tool_version("cuobjdump"), "nvdisasm": sass.tool_version("nvdisasm")}


def markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """docs/kernels.md: a section per architecture, in it one per kernel."""
    tools = ", ".join(f"{name} {version}" for name, version in toolchain().items())
    devices = "; ".join(
        f"sm_{arch}: {device.name}, {device.multiprocessors} multiprocessors, {device.bandwidth / 1e12:.3g} TB/s,"
        f" {device.tensor_rate / 1e12:,.0f} TFLOP/s in bf16 and {device.float_rate / 1e12:.3g} in float32"
        for arch, device in DEVICES.items()
    )
    lines = [
        "# Kernels and their resources",
        "",
        "Every kernel in every configuration that the code can launch, compiled for GPUs that need not be there.",
        "Nothing here was measured: registers, memory and instructions are the compiler's, the last four columns a"
        " model's.",
        "Written by `make kernels` (`omnigene-fast kernels --markdown docs/kernels.md`);"
        " `omnigene-fast kernels --check` fails on a spill,",
        "on a GEMM without tensor cores, and on a configuration that cannot launch.",
        "",
        f"Toolchain: {tools}.",
        f"Predictions at Gemma-4's size (E=128, K=8, H=2816, I=704) for {devices}.",
        "",
        "| column | meaning |",
        "|---|---|",
        *(f"| {column} | {meaning} |" for column, meaning in _LEGEND),
        "",
        *(line for line in summary(rows).replace("sm_", "- sm_").splitlines()),
        *(f"- {note}" for note in notes),
    ]
    last = None
    for (arch, language, kernel), group in _grouped(rows):
        if arch != last:
            lines += ["", f"## sm_{arch}"]
            last = arch
        lines += ["", f"### {kernel}" + (" (CUDA C++)" if language == "cuda" else ""), ""]
        lines += ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
    return "\n".join(lines) + "\n"


def configurations(text: str) -> set[tuple[str, ...]]:
    """(architecture, language, and what tells it apart) of every row of a markdown report."""
    found = set()
    arch = kernel = language = ""
    for line in text.splitlines():
        if section := re.match(r"## sm_(\d+)", line):
            arch = section[1]
        elif section := re.match(r"### (\w+)(.*)", line):
            kernel, language = section[1], "cuda" if "CUDA" in section[2] else "triton"
        elif arch and line.startswith("| ") and not line.startswith(f"| {HEADERS[0]} |"):
            what, tile, warps, stages, tokens = ("" if text == "-" else text for text in line[2:].split(" | ")[:5])
            key = configuration(kernel, what, tile, int(tokens), int(warps), int(stages) if stages else None)
            found.add((arch, language, *key))
    return found


def key_of(flat: dict[str, Any]) -> tuple[str, ...]:
    """What `configurations` finds for a row of the JSON report."""
    names = ("kernel", "what", "tile", "tokens", "warps", "stages")
    return str(flat["arch"]), flat["language"], *configuration(*(flat[name] for name in names))


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[tuple[int, str, str], Iterator[Row]]]:
    def place(row: Row) -> tuple[int, str, str]:
        return row.arch, row.language, row.kernel

    order = {place(row): number for number, row in reversed(list(enumerate(rows)))}
    return groupby(sorted(rows, key=lambda row: (row.arch, order[place(row)])), key=place)
