"""Step "table": the benchmark's rows, every provider checked first, kept after each case."""

import traceback
from collections.abc import Callable, Iterable

import torch

from omnigene_fast import info

from .. import report, runner
from ..providers import NAMES, REFERENCE, build
from ..workloads import Layer
from . import cases, status

PROVIDERS = tuple(name for name in NAMES if name != REFERENCE)


def run(context: status.Context) -> str | None:
    """Measure the cases that have no rows yet."""
    layers: dict[str, Layer] = {}
    probe = cases.probe_of(context.device, context.tiny)

    def measure(case: cases.Case) -> list[runner.Row]:
        settings = cases.settings_of(case, context.device, context.tiny)
        if not layers:
            runner.need_memory(settings.shape, settings.dtype, settings.device, (case[0],))
            layers["layer"] = Layer(settings.shape, settings.dtype, settings.device)
        layer = layers["layer"]
        if case[0] not in layer.low_bits:  # a layer in 8 bits, and what it stands for, are gigabytes
            layer.low_bits.clear()
        with torch.no_grad():
            built = build(case[0], layer, PROVIDERS)
            return runner.measure(*settings.cases()[0], layer, built, probe, settings)

    return each(context, "table", cases.table(), measure)


def each(
    context: status.Context,
    name: str,
    wanted: Iterable[cases.Case],
    measure: Callable[[cases.Case], list[runner.Row]],
) -> str | None:
    """Rows of every case of `wanted` that is not yet in DIR/rows/NAME.json, written after each."""
    path = context.out / "rows" / f"{name}.json"
    rows = report.load(path) if path.exists() else []
    environment = info.environment(context.device, torch.bfloat16)
    troubles = path.with_suffix(".problems.json")
    crashed: dict[str, str] = status.load_json(troubles, {})
    if context.retry:
        again = {_case(row) for row in ours_amiss(rows)}
        rows, crashed = [row for row in rows if _case(row) not in again], {}
        report.save(rows, path)
        status.save_json(troubles, crashed)
    for case in wanted:
        op, mode, tokens = case[0], case[1], cases.tokens_of(case[2], context.tiny)
        title = f"{op} {mode} T={tokens}"
        if title in crashed or any(_case(row) == (op, mode, tokens) for row in rows):
            continue
        print(f"{title}, {context.left:.0f} s left", flush=True)
        if context.tries(title) >= status.MAX_CUTS + 1:
            crashed[title] = "ended the process, or did not end in time, again and again"
        else:
            try:
                found = [environment | row for row in measure(case)]
            except Exception as crash:  # a case that cannot be set up is not the end of the others
                traceback.print_exc()
                crashed[title] = status.sentence(crash)
            else:
                rows += found
                report.save(rows, path)
                print(report.console(found), flush=True)
        status.save_json(troubles, crashed)
        context.progressed()
        status.check_device(context)
    wrong = [
        f"{row['provider']} {row['op']} {row['mode']} T={row['tokens']} {row['status']}" for row in ours_amiss(rows)
    ]
    return "; ".join([*(f"{title}: {why}" for title, why in crashed.items()), *wrong]) or None


def ours_amiss(rows: list[runner.Row]) -> list[runner.Row]:
    """Our own rows that are wrong or failed."""
    return [row for row in rows if row["provider"].startswith("omnigene_fast") and row["status"] in ("wrong", "failed")]


def _case(row: runner.Row) -> cases.Case:
    return row["op"], row["mode"], row["tokens"]
