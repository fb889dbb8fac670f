"""The router audit of the demo and of examples/: families of texts traced, and what a table of measures says."""

import importlib.util
from pathlib import Path
from typing import Any

from omnigene_fast.tracing.run import Run, open_trace
from omnigene_fast.tracing.texts import Row, trace_texts

from .model import BOS, PAD, byte_ids

NEEDED = ("pyarrow", "duckdb", "pandas", "plotly", "scipy")


def missing_packages() -> list[str]:
    """What a trace and its report need and is not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def trace_families(
    model: Any,
    path: Path,
    texts: dict[str, list[str]],
    length: int,
    title: str,
    note: str | None = None,
    **options: Any,
) -> Run:
    """Trace the byte tokens of `texts` (family -> texts) through `model`; the families become the label "task".

    Args:
        model: of byte tokens.
        path: directory of the run.
        texts: family -> texts; documents are numbered in their order, so that runs of several models pair up.
        length: bytes of a text that are kept, with the BOS.
        title: the model's name in the run.
        note: what a reader of the report has to know of it.
        options: of `trace`.
    """
    rows = [(family, text) for family, each in texts.items() for text in each]
    trace_texts(
        model,
        lambda some: [[BOS, *byte_ids(text)] for text in some],
        [Row(number, text, {"task": family}) for number, (family, text) in enumerate(rows)],
        path,
        pad=PAD,
        max_length=length,
        progress=True,
        meta={"model": title, "tokenizer": "bytes", **({} if note is None else {"note": note})},
        **options,
    )
    return open_trace(path)


def print_differentiation(runs: list[Run]) -> list[float]:
    """Print how differently the families are routed in each layer of each run; the corrected means over layers."""
    from omnigene_fast import analysis

    tables = [analysis.differentiation(run) for run in runs]
    first = tables[0].iloc[0]
    print(
        f"how differently the {first['groups']} families are routed: Jensen-Shannon divergence in nats (at most ln 2 ="
        f" 0.693),\nmean over the pairs of families, corrected for the {first['docs']} documents' noise, with its 95 %"
        " interval; floor: what\nit stays below in 95 % of the cases if the families do not differ\n"
    )
    print("  layer" + "".join(f"{run.name:>25}  {'floor':>6}" for run in runs))
    for row in range(len(tables[0])):
        line = f"  {tables[0].iloc[row]['layer']:>5}"
        for table in tables:
            each = table.iloc[row]
            floor = each["floor_95"] - each["floor"]  # that of uncorrected values, less their bias
            line += f"{each['corrected']:>10.3f} [{each['low']:.3f}, {each['high']:.3f}]  {floor:>5.3f}"
        print(line)
    print(flush=True)
    return [float(table.iloc[-1]["corrected"]) for table in tables]
