"""`omnigene-fast tune`: measures tiles of the expert GEMMs and writes them as a table (kernels/tables.py).

A bucket is a number of tokens. In it every kernel is measured with as many rows as its present tile has, half and
twice as many, and for each in three steps: the `SIZES` most promising of columns and reduction step halved, kept and
doubled, by a model (tune_model.py) and cut to what fits; the best of them with and without TMA descriptors, where the
GPU has them; the best of those with 4 and 8 warps and a stage more and less. A candidate whose numbers are not those
of the present tile is rejected, the others are timed in turns. The best of each step meet the present tile once more,
and what wins by less than `MARGIN` is noise and changes nothing.

What measures is passed in (tune_kernels.py has it for GPUs), as is the clock.
"""

import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels import tables, tiles
from .kernels.tables import Bucket, ExpertTiles, Kind, Table, Tile
from .kernels.weights import CONVERTS_E4M3, tiles_of_8_bits, up_of_bits
from .tune_journal import Budget, Journal, write
from .tune_model import Device, Work, depths, sizes, switches

SIZES = 5
MARGIN = 0.02
TOKENS = (64, 256, 512, 1024, 4096, 16384)
ROUNDS, FINAL_ROUNDS = 5, 25
OVER_ROWS = ("up", "down", "down_bwd", "low_rank")  # these share block_m
_COMPARED_BYTES = 64 << 20  # of float64 at a time


class Workload(Protocol):
    """The kernels at one number of tokens."""

    tokens: int
    work: dict[str, Work]  # of each of `Settings.kernels`

    def outputs(self, kernel: str, tile: Tile) -> tuple[Tensor, ...]:
        """What `kernel` computes with `tile`; raises what a launch raises."""
        ...


Measure = Callable[[Workload, str, Sequence[Tile], int], list[float]]
"""(workload, kernel, tiles, rounds) -> the median of each in microseconds."""


@dataclass(frozen=True)
class Settings:
    """What a table is for. `rank` > 0: with low-rank updates of that rank; `training`: with the backward's kernels."""

    device: Device
    shape: tuple[int, int, int, int]  # H, I, E, K
    dtype: torch.dtype = torch.bfloat16
    weights: str = "same"  # or int8, fp8
    rank: int = 0
    tokens: tuple[int, ...] = TOKENS
    training: bool = True

    def __post_init__(self) -> None:
        H, I, E, K = self.shape  # noqa: E741
        if min(self.shape) < 1 or K > E or H % 16 or I % 16:
            raise ValueError(f"shape: expected H, I multiples of 16 and 1 <= K <= E, got {H},{I},{E},{K}.")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens: expected numbers >= 1, got {list(self.tokens)}.")
        rows = [self.rows(tokens) for tokens in self.tokens]
        if len(set(rows)) < len(rows):
            raise ValueError(
                f"tokens: expected no two with as many rows per expert, got {list(self.tokens)}, which have {rows}."
            )
        if self.weights not in ("same", "int8", "fp8"):
            raise ValueError(f"weights: expected same, int8 or fp8, got {self.weights!r}.")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that are measured: projections that are in 8 bits or have a low-rank update have no gradient."""
        if not self.training:
            return ("up", "down", "low_rank") if self.rank else ("up", "down")
        frozen = self.rank > 0 or self.bits == 8
        gradients = ("low_rank", "low_rank_gram") if self.rank else () if frozen else ("gram",)
        return ("up", "down", "down_bwd", *gradients)

    @property
    def bits(self) -> int:
        return 16 if self.weights == "same" else 8

    @property
    def as_bits(self) -> bool:
        """Whether e4m3 reaches the kernels as its bits."""
        return self.weights == "fp8" and self.device.arch < CONVERTS_E4M3

    @property
    def kind(self) -> Kind:
        return tiles.kind(self.dtype, True, self.rank > 0, self.bits)

    def rows(self, tokens: int) -> int:
        return tiles.rows_per_expert(tokens, self.shape[3], self.shape[2])

    def present(self, tokens: int, device: str | None) -> ExpertTiles:
        """The tiles that these operands take now; with `device` None those that the architecture's table predicts."""
        return tiles_of_8_bits(self.in_tables(tokens, device), self.as_bits)

    def in_tables(self, tokens: int, device: str | None) -> ExpertTiles:
        """The same before the launch adapts them to e4m3 as bits: int8 takes them from the same bucket as they are."""
        options = {"lora": self.rank > 0, "weight_bits": self.bits, "device": device}
        return tiles.expert_tiles(self.rows(tokens), self.shape[1], self.dtype, self.device.arch, **options)

    def launched(self, kernel: str, tile: Tile) -> Tile:
        """What a launch makes of `tile` if a table has it."""
        return up_of_bits(tile) if kernel == "up" and self.as_bits else tile


@dataclass
class Outcome:
    """One bucket: microseconds of each kernel before and after, with the tiles."""

    tokens: int
    before: ExpertTiles
    after: ExpertTiles
    microseconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)

    @property
    def better(self) -> bool:
        return self.after != self.before


def groups(settings: Settings, present: dict[int, ExpertTiles]) -> list[tuple[int, str, int]]:
    """(tokens, kernel, block_m) of every measurement: with the present rows, half and twice as many."""
    found = []
    for tokens, kernel in product(settings.tokens, settings.kernels):
        own = getattr(present[tokens], kernel).block_m
        sizes = sorted({max(own // 2, 16), own, min(own * 2, 128)}) if kernel in OVER_ROWS else [own]
        found += [(tokens, kernel, block_m) for block_m in sizes]
    return found


def run(
    settings: Settings,
    workload: Callable[[int], Workload],
    measure: Measure,
    path: Path,
    *,
    seconds: float,
    command: str,
    versions: dict[str, str | None],
    progress: Callable[[str, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Measure, write the table at `path`, and say what came of it."""
    fields = {name: str(value) for name, value in vars(settings).items() if name != "tokens"}
    journal = Journal(path.with_name(f"{path.name}.part"), fields | {"versions": versions, "sizes": SIZES})
    outcomes = search(settings, workload, measure, Budget(seconds, clock), journal, progress)
    lines = [report(outcomes), ""]
    rejected = [text for outcome in outcomes for text in outcome.rejected]
    if rejected:
        lines += [f"{len(rejected)} candidates were rejected, as the first: {rejected[0]}", ""]
    if not outcomes:
        lines = ["no bucket was finished"]
    elif path.exists() and not any(outcome.better for outcome in outcomes):
        lines.append(f"nothing was faster by {MARGIN:.0%} or more: {path} stays as it is")
    else:
        write(path, table_text(settings, outcomes, command, versions, _old_table(path, settings.device)))
        tables.forget()
        tiles.expert_tiles.cache_clear()
        lines.append(f"table: {path}")
        if path == tables.user_file(settings.device.name):
            lines.append(f"It is used on {settings.device.name} from now on; delete it to go back.")
        else:
            lines.append(f"Set {tables.VARIABLE}={path} to use it on {settings.device.name}.")
    if len(outcomes) < len(settings.tokens):
        lines.append(
            f"The budget sufficed for {len(outcomes)} of {len(settings.tokens)} token counts; the same command goes on"
            " from there."
        )
    else:
        journal.remove()
    return "\n".join(lines)


def search(
    settings: Settings,
    workload: Callable[[int], Workload],
    measure: Measure,
    budget: Budget,
    journal: Journal,
    progress: Callable[[str, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """The outcome of each bucket that was finished within the budget."""
    present = {}
    for tokens in settings.tokens:
        # Of a run that goes on, those of its beginning: it may have written a table since.
        key = f"T={tokens} present"
        if key not in journal.found:
            tiles_now = settings.present(tokens, settings.device.name)
            journal.add(key, {"tiles": {name: vars(tile) for name, tile in vars(tiles_now).items()}})
        present[tokens] = ExpertTiles(**{n: Tile(**tile) for n, tile in journal.found[key]["tiles"].items()})
    todo = groups(settings, present)
    outcomes: list[Outcome] = []
    for tokens in settings.tokens:
        load: Workload | None = None
        times: dict[tuple[str, int], list[tuple[Tile, float]]] = {}
        rejected: list[str] = []
        for kernel, block_m in ((kernel, block_m) for t, kernel, block_m in todo if t == tokens):
            key = f"T={tokens} {kernel} block_m={block_m}"
            if key not in journal.found:
                if budget.spent:
                    return outcomes
                try:
                    load = load or workload(tokens)
                    entry = _measured(settings, load, kernel, block_m, present[tokens], measure)
                except torch.OutOfMemoryError as error:
                    raise torch.OutOfMemoryError(
                        f"tune: expected room on the GPU for {kernel} of {tokens} tokens, got:"
                        f" {str(error).strip().rstrip('.')}; use fewer --tokens or --no-training."
                    ) from error
                journal.add(key, entry)
            entry = journal.found[key]
            times[kernel, block_m] = [(Tile(**tile), us) for tile, us in entry["times"]]
            rejected += [f"{key}: {reason}" for reason in entry["rejected"]]
            progress(key, len(todo))
        outcomes.append(_chosen(tokens, present[tokens], times, rejected))
    return outcomes


def _measured(
    settings: Settings, load: Workload, kernel: str, block_m: int, present: ExpertTiles, measure: Measure
) -> dict[str, Any]:
    """Times of one kernel with `block_m` rows: of the best tile of each step, and of the present one if it has as many.

    Steps: sizes, then what goes with the best of them, its switches, then its warps and stages.
    """
    now, work, device = getattr(present, kernel), load.work[kernel], settings.device
    expected = load.outputs(kernel, now)
    best = now if now.block_m == block_m else None
    finalists, seen, rejected = [best] if best else [], {now}, []
    steps: tuple[Callable[[Tile], list[Tile]], ...] = (
        lambda tile: sizes(work, tile, block_m, device, SIZES),
        lambda tile: switches(work, tile, device.arch),
        lambda tile: depths(work, tile, device.arch),
    )
    for step in steps:
        tried = [best] if best else []
        for tile in (settings.launched(kernel, tile) for tile in step(best or now)):
            if tile in seen:
                continue
            seen.add(tile)
            try:
                reason = disagreement(expected, load.outputs(kernel, tile), load.outputs(kernel, tile))
            except torch.OutOfMemoryError:  # the comparison's or the operands' size, not the candidate
                raise
            except Exception as error:  # whatever a compiler or a launch raises concerns this candidate alone
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason is None:
                tried.append(tile)
            else:
                rejected.append(f"{short(tile)}: {reason}")
        if not tried:
            break
        times = dict(zip(tried, measure(load, kernel, tried, ROUNDS), strict=True)) if len(tried) > 1 else {}
        best = min(tried, key=lambda tile: times.get(tile, 0.0))
        finalists += [best] if best not in finalists else []
    times = dict(zip(finalists, measure(load, kernel, finalists, FINAL_ROUNDS), strict=True)) if finalists else {}
    return {"times": [[vars(tile), us] for tile, us in times.items()], "rejected": rejected}


def disagreement(expected: Sequence[Tensor], *runs: Sequence[Tensor]) -> str | None:
    """Why outputs are not those expected, to rounding, or not the same in each run; None if they are."""
    for outputs in runs:
        for n, (out, right, first) in enumerate(zip(outputs, expected, runs[0], strict=True)):
            eps = max(torch.finfo(right.dtype).eps, 2**-18)  # other tiles sum float32 in another order
            (largest, norm), (most, size) = _extent(out, right)
            error = norm / max(size, 1e-300)
            if not (largest <= 2 * eps * most and error <= eps):
                return f"output {n} is wrong: relative error {error:.1e}, at most {eps:.1e} is rounding"
            if not torch.equal(out, first):
                return f"output {n} is not the same in two runs"
    return None


def _extent(out: Tensor, right: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Maximum and norm of `out` - `right` and of `right`, in float64, of which only a part exists at a time."""
    rows = max(_COMPARED_BYTES // (8 * max(right[0].numel(), 1)), 1)
    most, squares = right.new_zeros(2, dtype=torch.float64), right.new_zeros(2, dtype=torch.float64)
    for part, expected in zip(out.split(rows), right.split(rows), strict=True):
        wide = expected.double()
        for n, values in enumerate((part.double() - wide, wide)):
            most[n] = torch.maximum(most[n], values.abs().max())  # a NaN stays one
            squares[n] += values.norm().square()
    (largest, maximum), (norm, size) = most.tolist(), squares.sqrt().tolist()
    return (largest, norm), (maximum, size)


def _chosen(
    tokens: int, present: ExpertTiles, times: dict[tuple[str, int], list[tuple[Tile, float]]], rejected: list[str]
) -> Outcome:
    """The fastest tiles: of kernels over rows with the block_m that is fastest for all of them together."""

    def best(kernel: str, block_m: int) -> tuple[Tile, float] | None:
        measured = times.get((kernel, block_m), [])
        fastest = min(measured, key=lambda pair: pair[1], default=None)
        own = next((pair for pair in measured if pair[0] == getattr(present, kernel)), None)
        return own if own and fastest and fastest[1] > (1 - MARGIN) * own[1] else fastest

    kernels = list(dict.fromkeys(kernel for kernel, _ in times))
    over_rows = [kernel for kernel in kernels if kernel in OVER_ROWS]
    totals = {}
    for block_m in sorted({block_m for kernel, block_m in times if kernel in OVER_ROWS}):
        found = [best(kernel, block_m) for kernel in over_rows]
        if all(found):
            totals[block_m] = sum(pair[1] for pair in found if pair)
    block_m = min(totals, key=lambda size: totals[size], default=present.block_m)
    if present.block_m in totals and totals[block_m] > (1 - MARGIN) * totals[present.block_m]:
        block_m = present.block_m
    changes = {kernel: replace(getattr(present, kernel), block_m=block_m) for kernel in OVER_ROWS}
    outcome = Outcome(tokens, present, present, rejected=rejected)
    for kernel in kernels:
        now = getattr(present, kernel)
        chosen = best(kernel, block_m if kernel in OVER_ROWS else now.block_m)
        before = dict(times.get((kernel, now.block_m), [])).get(now, math.nan)
        if chosen is not None:
            changes[kernel] = chosen[0]
            outcome.microseconds[kernel] = (before, chosen[1])
    outcome.after = replace(present, **changes)
    return outcome


def _old_table(path: Path, device: Device) -> Table | None:
    """The table that a new one at `path` goes on from: the device's own that is there, else the one that is in use."""
    try:
        here = tables.read(path) if path.exists() else None
    except ValueError:  # no table: there is nothing in it to keep
        here = None
    if here is not None and here.device == device.name:
        return here
    return next((table for table in tables.tables(device.arch, device.name) if table.device == device.name), None)


def table_text(
    settings: Settings,
    outcomes: Sequence[Outcome],
    command: str,
    versions: dict[str, str | None],
    old: Table | None,
) -> str:
    """The table with these outcomes: what `old` has measured elsewhere stays, and of the architecture's predictions
    those that are more than an octave away from any measurement, so that the nearest bucket is near."""
    kind, name = settings.kind, settings.device.name
    new = []
    for outcome in outcomes:
        note = {"microseconds": {kernel: round(us[1], 2) for kernel, us in outcome.microseconds.items()}}
        new.append(_bucket(kind, settings.rows(outcome.tokens), outcome.after, note))
    kept = [bucket for bucket in old.buckets if not bucket.serves(kind) or _far(bucket, new, 0.5)] if old else []
    kept = [bucket for bucket in kept if not (bucket.serves(kind) and (bucket.note or {}).get("source") == "predicted")]
    measured = [*new, *(bucket for bucket in kept if bucket.serves(kind))]
    for bucket in tiles.tables_of(settings.device.arch, None)[0].buckets:
        if bucket.serves(kind) and _far(bucket, measured, 1.0):
            tokens = max(round(bucket.rows_per_expert * settings.shape[2] / settings.shape[3]), 1)
            predicted = settings.in_tables(tokens, None)
            new.append(_bucket(kind, bucket.rows_per_expert, predicted, {"source": "predicted"}))
    buckets = sorted(
        [*kept, *new], key=lambda b: (b.dtype, not b.aligned, b.weights or "", bool(b.lora), b.rows_per_expert)
    )
    header = {
        "version": tables.VERSION,
        "arch": [settings.device.arch],
        "source": "measured",
        "device": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions,
        "command": command,
        "shape": dict(zip("HIEK", settings.shape, strict=True)),
    }
    content = tables.text(header, buckets)
    tables.parse(json.loads(content), Path("the new table"))
    return content


def _bucket(kind: Kind, rows: float, choice: ExpertTiles, note: dict[str, Any]) -> Bucket:
    return Bucket(kind.dtype, rows, choice, kind.aligned, kind.lora, kind.weights, note)


def _far(bucket: Bucket, others: Sequence[Bucket], octaves: float) -> bool:
    return all(abs(math.log2(bucket.rows_per_expert / other.rows_per_expert)) > octaves for other in others)


def report(outcomes: Sequence[Outcome]) -> str:
    """Before and after, a line per kernel and bucket."""
    lines = [f"{'tokens':>7}  {'kernel':<13}  {'before µs':>10}  {'after µs':>10}  {'gain':>6}  tile"]
    for outcome in outcomes:
        for kernel, (before, after) in outcome.microseconds.items():
            tile = getattr(outcome.after, kernel)
            gain = f"{100 * (before / after - 1):+.0f} %" if tile != getattr(outcome.before, kernel) else "as is"
            lines.append(
                f"{outcome.tokens:>7}  {kernel:<13}  {before:>10.1f}  {after:>10.1f}  {gain:>6}  {short(tile)}"
            )
    return "\n".join(lines)


def short(tile: Tile) -> str:
    """A tile in a few words: 64x128x64, 8 warps, 4 stages."""
    extras = [name for name in ("tma", "persistent") if getattr(tile, name)]
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return ", ".join([sizes, f"{tile.warps} warps", f"{tile.stages} stages", *extras])
