"""The section of a GPU's rows: tables in microseconds, share of the floor, the goals, and where we lose."""

import functools
import json
import re
from pathlib import Path

from . import goals
from .lowbit import LOW_BIT_OPS
from .providers import EXTRA_OPS, NAMES, OURS, REFERENCE
from .report import TITLES, TRAINED, cases, error, megabytes, ratio, span_of_dates
from .runner import Row, is_peer
from .training import TRAINING_OPS

PREDICTIONS = Path(__file__).resolve().parent / "predictions" / "h100.json"
MODEL_TITLES = {
    "model_prefill": "prefill",
    "model_decode": "decode",
    "model_frozen": "training step, experts frozen",
    "model_lora16": "training step, LoRA r=16 on the experts",
}
GPU_TITLES = (
    TITLES
    | {
        "experts_int8": "Experts in int8",
        "experts_fp8": "Experts in float8_e4m3fn",
        "route_traced": "Router with a trace",
        "decode": "Decode: blocks of several layers in one CUDA graph, per layer",
    }
    | {op: f"Forward + backward, trained: {what}" for op, what in TRAINED.items()}
)
ORDER = ("experts", *TRAINING_OPS, "route", *EXTRA_OPS[:1], "block", "decode", *LOW_BIT_OPS)


METHOD = (
    "Microseconds are medians of interleaved rounds between CUDA events, from a cold L2, with the host's launches"
    " hidden where a call does not wait for the device; `host` is what the host spends in our call. The floor is the"
    " larger of bytes / bandwidth and FLOPs / peak, and `of floor` is the floor over our time. Speed-up is the best"
    " correct peer's time over ours. Errors are against float64: ours, then eager's."
)


def is_gpu(rows: list[Row]) -> bool:
    """Whether rows were measured on a GPU."""
    return bool(rows) and rows[0].get("probe") == "cuda"


def section(rows: list[Row], name: str, plots: list[str]) -> str:
    """What the README says of one GPU; `name` is the file of the rows, `plots` are pictures beside it."""
    parts = [heading(rows, name), *tables(rows)]
    parts += [f"![Time against tokens](bench/results/{plot})" for plot in plots]
    if any(map(goals.holds, rows)):
        parts.append("**Goals**\n\n" + goals_table(rows))
    lost = losses(rows)
    parts.append("**Where we lose** (slower or with more memory than a peer, wrong, or beyond a goal)")
    parts.append("\n".join(f"- {line}" for line in lost) if lost else "Nowhere in these rows.")
    return "\n\n".join(parts)


def tables(rows: list[Row]) -> list[str]:
    """One for each operation that was measured, and one for the model."""
    kernels = [row for row in rows if not row["op"].startswith("model_")]
    parts = []
    for op in ORDER:
        mine = [row for row in kernels if row["op"] == op]
        if mine:
            parts.append(_table(op, mine))
    models = [row for row in rows if row["op"].startswith("model_")]
    if models:
        parts.append(_models(models))
    return parts


def heading(rows: list[Row], name: str) -> str:
    """Device, date, versions, and how the figures came about."""
    first = rows[0]
    versions = first["versions"]
    E, H, I, K = (first["shape"][place] for place in (2, 0, 1, 3))  # noqa: E741
    middle = len(rows) // 2
    bandwidth = sorted(row["bandwidth_gb_s"] for row in rows)[middle]
    peak = sorted(row["peak_gflop_s"] for row in rows)[middle]
    return (
        f"### {first['device']}, {first['backend']} kernels\n\n"
        f"Measured {span_of_dates(rows)} with torch {versions['torch']}, Triton {versions['triton']}, transformers"
        f" {versions['transformers']}, Python {versions['python']}: E={E}, K={K}, H={H}, I={I}, {first['dtype']}."
        f" Probed in the same run: {bandwidth:,.0f} GB/s and {peak / 1e3:,.0f} TFLOP/s (8192³ product).\n\n{METHOD}"
        f" Rows: [`bench/results/{name}`](bench/results/{name})."
    )


def _table(op: str, rows: list[Row]) -> str:
    seen = {row["provider"] for row in rows if row["status"] not in ("missing", "skipped")}
    names = [name for name in NAMES if name in seen and name not in (OURS, REFERENCE)]
    trained = op in TRAINING_OPS
    head = ["routing", "T", "floor", "ours", "of floor", "TFLOP/s", "host", *names, "speed-up"]
    head += ["our MB", "least MB of a peer"] if trained else []
    head += ["error", "eager's"]
    lines = [f"**{GPU_TITLES[op]}**, microseconds", "", "| " + " | ".join(head) + " |"]
    lines.append("|---" + "|--:" * (len(head) - 1) + "|")
    for case in cases(rows):
        by_name = {row["provider"]: row for row in case}
        ours: Row = by_name.get(OURS, {})
        gain = ours.get("best_peer_over_this")
        cells = [case[0]["mode"], str(case[0]["tokens"]), us(case[0]["floor_ms"]), _cell(by_name.get(OURS))]
        cells += [_percent(ours), ratio(ours.get("tflops")), us(ours.get("host_ms"))]
        cells += [_cell(by_name.get(name)) for name in names]
        cells += ["-" if gain is None else f"**{gain:.2f}x**"]
        if trained:
            peers = [row for row in case if is_peer(row) and row.get("peak_mb") is not None]
            cells += [megabytes(ours), megabytes(min(peers, key=lambda row: row["peak_mb"], default={}))]
        cells += [error(ours.get("error")), error(case[0]["eager_error"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _models(rows: list[Row]) -> str:
    seen = {row["provider"] for row in rows if row["status"] == "ok"}
    names = [name for name in NAMES if name in seen]
    head = ["", "T", *(f"{name} tokens/s" for name in names), "speed-up", *(f"{name} MB" for name in names)]
    layers = rows[0]["layers"]
    title = f"**A Gemma-4 of {layers} layers at the true width** (vocabulary 4,096; by the clock, launches and all)"
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for case in cases(rows):
        by_name = {row["provider"]: row for row in case}
        gain = by_name.get(OURS, {}).get("best_peer_over_this")
        cells = [MODEL_TITLES[case[0]["op"]], str(case[0]["tokens"])]
        cells += [_rate(by_name.get(name)) for name in names]
        cells += ["-" if gain is None else f"**{gain:.2f}x**"]
        cells += [megabytes(by_name.get(name, {})) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals_table(rows: list[Row]) -> str:
    """Goal, predicted on an H100, measured, met or not, times the floor, times faster than the best peer."""
    lines = ["| goal | routing | predicted | measured | met | x floor | x best peer |", "|---|---|--:|--:|---|--:|--:|"]
    for each in goals.judge(rows):
        met = {True: "yes", False: "**no**", None: "not measured"}[each.met]
        measured = each.measured or "-"
        cells = [
            each.goal,
            each.mode,
            predicted(each.goal, each.mode),
            measured,
            met,
            ratio(each.over_floor),
            ratio(each.over_best_peer),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def predicted(goal: str, mode: str) -> str:
    """What the model of the kernels expects of a goal on a time, "-" where it says nothing."""
    named = re.fullmatch(r"(\w+) T=(\d+) <= [\d,]+ us", goal)
    expected = named and _predictions().get((named[1], mode, int(named[2])))
    return f"{expected:,.4g} us" if expected else "-"


@functools.cache
def _predictions() -> dict[tuple[str, str, int], float]:
    rows = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else []
    return {(row["op"], row["mode"], row["tokens"]): row["expected_us"] for row in rows}


def losses(rows: list[Row]) -> list[str]:
    """A sentence for each case in which ours is slower or larger than a peer, wrong, not run, or beyond a goal."""
    found = []
    for case in cases(rows):
        ours = next((row for row in case if row["provider"] == OURS), None)
        if ours is None:
            continue
        where = f"{ours['op']}, {ours['mode']}, T={ours['tokens']}"
        if ours["status"] != "ok":
            found.append(f"{where}: {ours['status']} ({ours['note']})")
            continue
        gain = ours["best_peer_over_this"]
        if gain is not None and gain < 1:
            best = min((row for row in case if is_peer(row) and row["p50_ms"]), key=lambda row: row["p50_ms"])
            found.append(f"{where}: {1 / gain:.2f}x slower than {best['provider']}")
        peers = [row for row in case if is_peer(row) and row.get("peak_mb") is not None]
        if peers and ours.get("peak_mb") is not None:
            leanest = min(peers, key=lambda row: row["peak_mb"])
            if ours["peak_mb"] > 1.01 * leanest["peak_mb"]:
                found.append(
                    f"{where}: {megabytes(ours)} MB at its peak, {leanest['provider']} {megabytes(leanest)} MB"
                )
        if ours["eager_error"] and ours["error"] > 1.01 * ours["eager_error"]:
            found.append(f"{where}: error {error(ours['error'])}, transformers' eager {error(ours['eager_error'])}")
    if any(map(goals.holds, rows)):
        missed = [each for each in goals.judge(rows) if each.met is False]
        found += [f"goal missed: {each.goal}, {each.mode}: {each.measured}" for each in missed]
    return found


def us(value: float | None) -> str:
    """Milliseconds as microseconds."""
    return "-" if value is None else f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:,.0f}"


def _percent(row: Row) -> str:
    over = row.get("over_floor")
    return "-" if not over else f"{100 / over:.0f} %"


def _cell(row: Row | None) -> str:
    if row is None or row["status"] in ("skipped", "missing"):
        return "-"
    return us(row["p50_ms"]) if row["status"] == "ok" else row["status"]


def _rate(row: Row | None) -> str:
    if row is None or row["status"] != "ok":
        return "-" if row is None or row["status"] in ("skipped", "missing") else row["status"]
    return f"{row['tokens_per_s']:,.0f}"


def plots_beside(path: Path) -> list[str]:
    """The names of the pictures that exist for a file of rows."""
    places = (path.with_suffix(".png"), path.with_name(f"{path.stem}-training.png"))
    return [place.name for place in places if place.exists()]
