"""What the kernels should take on an H100, before they have been measured there: a model, and its committed numbers.

A kernel takes the longer of its bytes over the bandwidth and its FLOPs over the peak, at the share of each that kernels
of its kind reach (the constants below, from published figures of others), plus a part of the shorter, because the two
overlap only so far, plus a start. FLOPs are those of whole row tiles: an expert with three tokens computes sixteen
rows. Bytes include the activations between the kernels, which the floor leaves out. The expected number of experts
that are hit, and of rows that are padded, come from draws of the benchmark's own routing.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..floors import work_of
from ..runner import Row
from ..training import RANKS
from ..workloads import TRUE_SHAPE, Shape, routing_bias
from . import cases

PREDICTIONS = Path(__file__).resolve().parents[1] / "predictions" / "h100.json"
BANDWIDTH, PEAK = 3350.0, 800_000.0  # GB/s; GFLOP/s, what an 8192³ product reaches
READS = 0.82  # of the bandwidth: Liger's forward at T = 128 reads its weights at 81 %
COMPUTES = 0.65  # of the peak: a Triton grouped GEMM on Hopper (Liger 0.61 at T = 32,768, SonicMoE 0.69)
COMPUTES_GRAM = 0.55  # sums over an expert's tokens: the tiles' reduction is short
OVERLAP = 0.25  # of the shorter of the two that does not hide behind the longer
START = 3.0  # microseconds from a kernel to the next behind it on the stream
NEXT_START = 2.0  # of decode's second kernel, which starts and asks for weights while the first one ends
SMALL = 16  # tokens that the decode path serves
MULTIPROCESSORS = 132
TAKES_IN = 50_000.0  # bytes per microsecond into one multiprocessor
TICKET, CHOICE = 1.2, 1.5  # microseconds: finding out who is last; softmax and top-k of a program's tokens
DRAWS = 8
HALF = 2  # bytes


@dataclass(frozen=True)
class Routing:
    """Means over draws: experts that are hit, and rows of whole tiles."""

    hit: float
    rows: float


@functools.cache
def routing(mode: str, tokens: int, shape: Shape = TRUE_SHAPE) -> Routing:
    """Of `tokens` tokens under `mode`."""
    generator = torch.Generator().manual_seed(11)
    bias = routing_bias(mode, shape.E, shape.K)
    tile = min(128, max(16, 1 << max(0, -(-tokens * shape.K // shape.E) - 1).bit_length()))
    hits, rows = 0.0, 0.0
    for _ in range(DRAWS):
        index = (torch.randn(tokens, shape.E, generator=generator) + bias).topk(shape.K, dim=-1).indices
        visits = torch.bincount(index.flatten(), minlength=shape.E)
        hits += float((visits > 0).sum()) / DRAWS
        rows += float(((visits + tile - 1) // tile * tile).sum()) / DRAWS
    return Routing(hits, rows)


def kernel_us(size: float, flops: float, reads: float = READS, computes: float = COMPUTES) -> float:
    """Microseconds of one kernel that moves `size` bytes and computes `flops`."""
    moved, computed = size / (BANDWIDTH * reads) / 1e3, flops / (PEAK * computes) / 1e3
    return max(moved, computed) + OVERLAP * min(moved, computed) + START


def predict(op: str, mode: str, tokens: int, shape: Shape = TRUE_SHAPE) -> tuple[float, float]:
    """(floor, expectation) in microseconds."""
    found = routing(mode, tokens, shape)
    ideal = work_of(op if op != "decode" else "block", shape, tokens, round(found.hit), torch.bfloat16)
    return 1e3 * ideal.floor_ms(BANDWIDTH, PEAK), _expected(op, tokens, shape, found)


def _expected(op: str, tokens: int, shape: Shape, found: Routing) -> float:
    if op in ("route", "route_traced"):
        return _gate(op, tokens, shape)
    if op in ("block", "decode"):
        norm = kernel_us(2 * tokens * shape.H * HALF, 0)
        return _gate("route", tokens, shape) + norm + _forward(tokens, shape, found, HALF)
    if op in ("experts", "experts_int8", "experts_fp8"):
        return _forward(tokens, shape, found, HALF if op == "experts" else 1)
    ours = _forward(tokens, shape, found, HALF, saved=True) + _backward(tokens, shape, found, full=op == "experts_full")
    if op in RANKS:
        ours += _lora(RANKS[op], tokens, shape, found)
    return ours


def _gate(op: str, tokens: int, shape: Shape) -> float:
    """The router's form is that of `tiles.route_tile`: what one multiprocessor takes in, or memory, then the choice."""
    from ...kernels.tiles import route_tile  # it imports Triton, which the rest does without

    tile = route_tile(tokens, shape.E, shape.H, torch.bfloat16, "hf", 90)
    programs = -(-tokens // tile.block_t) * -(-shape.E // tile.block_n)
    waves = max(programs / MULTIPROCESSORS, 1.0) if tile.block_t == 1 else float(-(-programs // MULTIPROCESSORS))
    row = waves * shape.H * HALF / TAKES_IN
    norm = 0.0 if tile.block_t == 1 else max(tile.block_t * row, tokens * shape.H * HALF / (BANDWIDTH * READS) / 1e3)
    total = START + norm + (tile.block_t + tile.block_n) * row
    total += TICKET + CHOICE if tile.select else kernel_us(tokens * shape.E * 6, 0)
    traced = (
        work_of(op, shape, tokens, 0, torch.bfloat16).bytes - work_of("route", shape, tokens, 0, torch.bfloat16).bytes
    )
    return total + traced / BANDWIDTH / 1e3


def _forward(tokens: int, shape: Shape, found: Routing, weight_bytes: int, *, saved: bool = False) -> float:
    """Dispatch, up, down, combine; on few tokens no dispatch, and the sum over picks at the end of down."""
    H, I, picks = shape.H, shape.I, tokens * shape.K  # noqa: E741
    matrix = found.hit * H * I * weight_bytes
    if tokens <= SMALL:
        return START + 3 * matrix / (BANDWIDTH * READS) / 1e3 + NEXT_START
    between = picks * I * HALF
    dispatch = START if picks <= 4096 else 2 * START + picks * 32 / BANDWIDTH / 1e3
    up = kernel_us(2 * matrix + tokens * H * HALF + between * (3 if saved else 1), 4.0 * found.rows * H * I)
    down = kernel_us(matrix + between + picks * H * HALF, 2.0 * found.rows * H * I)
    return dispatch + up + down + kernel_us((picks + tokens) * H * HALF, 0)


def _backward(tokens: int, shape: Shape, found: Routing, *, full: bool) -> float:
    H, I, picks = shape.H, shape.I, tokens * shape.K  # noqa: E741
    matrix, between, wide = found.hit * H * I * HALF, picks * I * HALF, picks * H * HALF
    dispatch = START if picks <= 4096 else 2 * START + picks * 32 / BANDWIDTH / 1e3
    stored = 2 * between + 2 * between + (between if full else 0)  # pre-activation in, its gradient out, weighted h
    down = kernel_us(matrix + tokens * H * HALF + stored, 2.0 * found.rows * H * I)
    up = kernel_us(2 * matrix + 2 * between + wide, 4.0 * found.rows * H * I)
    total = dispatch + down + START + up + kernel_us(wide + tokens * H * HALF, 0)
    if full:
        gradient = shape.E * H * I * HALF
        total += kernel_us(gradient + between + tokens * H * HALF, 2.0 * picks * H * I, READS, COMPUTES_GRAM)
        total += kernel_us(2 * gradient + 2 * between + tokens * H * HALF, 4.0 * picks * H * I, READS, COMPUTES_GRAM)
    return total


def _lora(rank: int, tokens: int, shape: Shape, found: Routing) -> float:
    """Nine small grouped products besides those that ride in the tails of the large ones, and PEFT's casts."""
    H, I, picks = shape.H, shape.I, tokens * shape.K  # noqa: E741
    rows = picks * (2 * H + 3 * I) * HALF
    factors = shape.E * rank * (2 * H + 3 * I)
    casts = kernel_us(factors * (4 + HALF) * 2 + factors * (4 + HALF) * 2, 0)  # to half precision and back, and layouts
    return 9 * START + kernel_us(3 * rows, 6.0 * found.rows * rank * (2 * H + 3 * I), READS, 0.2) + casts


def table() -> list[Row]:
    """Every case of the suite at the true shape."""
    rows: list[Row] = []
    for op, mode, tokens in (*cases.table(), *cases.decode()):
        floor, expected = predict(op, mode, tokens)
        figures = {"floor_us": float(f"{floor:.4g}"), "expected_us": float(f"{expected:.4g}")}
        rows.append({"op": op, "mode": mode, "tokens": tokens, "hit": round(routing(mode, tokens).hit, 1)} | figures)
    return rows


def markdown(rows: list[Row]) -> str:
    """The table as text."""
    lines = [
        "| operation | routing | T | experts hit | floor us | expected us | x floor |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        over = float(row["expected_us"]) / float(row["floor_us"])
        cells = [row["op"], row["mode"], row["tokens"], row["hit"], row["floor_us"], row["expected_us"], f"{over:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(out: Path | None = None) -> None:
    """Print the table; with `out`, also write it there as JSON."""
    rows = table()
    print(markdown(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
