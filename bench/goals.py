"""The goals of the GPU kernels, and whether rows meet them.

They hold on one H100, for the median from a cold L2, under uniform and skewed routing, at Gemma-4's shape in bfloat16.
Beside the times: at least twice the speed of transformers' best path at every T, and a trace that costs at most one
hundredth of the block.
"""

from dataclasses import dataclass

from .providers import OURS, TRANSFORMERS
from .runner import Row
from .training import FALLBACK
from .workloads import TRUE_SHAPE

DEVICE = "H100"
SHAPE = [TRUE_SHAPE.H, TRUE_SHAPE.I, TRUE_SHAPE.E, TRUE_SHAPE.K]
# Microseconds by (operation, T).
LIMITS_US = {("experts", 1): 45, ("experts", 8): 230, ("experts", 64): 520, ("experts", 512): 560}
LIMITS_US |= {("experts", 4096): 850, ("experts", 16384): 3100}
LIMITS_US |= {("experts_frozen", 4096): 1700, ("experts_full", 16384): 11000}
LIMITS_US |= {("route_traced", 1): 12, ("route_traced", 16384): 60}
PEER_FACTOR = 2.0
PEER_TOKENS = (1, 8, 64, 512, 4096, 16384)
TRACE_SHARE = 0.01
TRACE_TOKENS = (1, 16384)
STOCK = (*TRANSFORMERS, FALLBACK)


@dataclass(frozen=True)
class Judgement:
    """One goal under one routing: what was asked, what came ("" and None: not measured), and how far it is."""

    goal: str
    mode: str
    measured: str
    met: bool | None
    over_floor: float | None = None
    over_best_peer: float | None = None  # the best peer's time over ours


def judge(rows: list[Row]) -> list[Judgement]:
    """Every goal for every routing that its operation was measured under; those without a row are listed too."""
    found = []
    for (op, tokens), limit in LIMITS_US.items():
        modes = sorted({row["mode"] for row in rows if row["op"] == op and row["tokens"] == tokens}, key=_uniform_first)
        for mode in modes or ["uniform"]:
            found.append(_time(rows, op, mode, tokens, limit))
    for tokens in PEER_TOKENS:
        modes = sorted({row["mode"] for row in rows if row["op"] == "experts" and row["tokens"] == tokens})
        for mode in sorted(modes, key=_uniform_first) or ["uniform"]:
            found.append(_peers(rows, mode, tokens))
    return found + [_trace(rows, tokens) for tokens in TRACE_TOKENS]


def holds(row: Row) -> bool:
    """Whether the goals are about rows like this one."""
    return DEVICE in row["device"] and row["dtype"] == "bfloat16" and row["shape"] == SHAPE


def _uniform_first(mode: str) -> tuple[bool, str]:
    return mode != "uniform", mode


def _row(rows: list[Row], op: str, mode: str, tokens: int, provider: str = OURS) -> Row | None:
    wanted = (op, mode, tokens, provider)
    return next((row for row in rows if (row["op"], row["mode"], row["tokens"], row["provider"]) == wanted), None)


def _time(rows: list[Row], op: str, mode: str, tokens: int, limit: int) -> Judgement:
    goal = f"{op} T={tokens} <= {limit:,} us"
    row = _row(rows, op, mode, tokens)
    if row is None or row["p50_ms"] is None:
        return Judgement(goal, mode, "" if row is None else str(row["status"]), None if row is None else False)
    took = 1e3 * row["p50_ms"]
    return Judgement(goal, mode, f"{took:,.4g} us", took <= limit, row["over_floor"], row["best_peer_over_this"])


def _peers(rows: list[Row], mode: str, tokens: int) -> Judgement:
    goal = f"experts T={tokens} >= {PEER_FACTOR:g}x transformers' best path"
    ours = _row(rows, "experts", mode, tokens)
    stock = [_row(rows, "experts", mode, tokens, name) for name in STOCK]
    times = [row["p50_ms"] for row in stock if row is not None and row["status"] == "ok"]
    if ours is None or not times:
        return Judgement(goal, mode, "", None)
    if ours["p50_ms"] is None:
        return Judgement(goal, mode, str(ours["status"]), False)
    gain = min(times) / ours["p50_ms"]
    met = gain >= PEER_FACTOR
    return Judgement(goal, mode, f"{gain:.2f}x", met, ours["over_floor"], ours["best_peer_over_this"])


def _trace(rows: list[Row], tokens: int) -> Judgement:
    goal = f"trace T={tokens} <= {100 * TRACE_SHARE:g} % of router and experts"
    names = ("route", "route_traced", "experts")
    measured = [_row(rows, op, "uniform", tokens) for op in names]
    times = [row["p50_ms"] for row in measured if row is not None and row["p50_ms"] is not None]
    if len(times) < len(names):
        return Judgement(goal, "uniform", "", None)
    route, traced, experts = times
    share = (traced - route) / (route + experts)
    return Judgement(goal, "uniform", f"{100 * share:.2f} %", share <= TRACE_SHARE)
