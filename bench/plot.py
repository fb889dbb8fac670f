"""Time against tokens, log-log, one panel per operation and routing mode, with the floor.

Forward operations and those with a backward have a picture each.
"""

from pathlib import Path
from typing import Any

from .providers import NAMES, OURS, OURS_INPUT
from .runner import Row
from .training import FALLBACK, TRAINING_OPS

# Okabe-Ito colours: apart for colour-blind readers; markers tell the providers apart without colour.
STYLES = {
    OURS: ("#D55E00", "o", 2.4),
    OURS_INPUT: ("#F0A060", "h", 1.8),
    "eager": ("#0072B2", "s", 1.4),
    "grouped_mm": ("#009E73", "^", 1.4),
    "batched_mm": ("#CC79A7", "v", 1.4),
    FALLBACK: ("#000000", "x", 1.4),
    "liger": ("#E69F00", "D", 1.4),
    "scattermoe": ("#56B4E9", "P", 1.4),
    "sonicmoe": ("#8C6D31", "X", 1.4),
    "vllm": ("#6A3D9A", "*", 1.4),
    "reference": ("#999999", ".", 1.0),
}


def plot(rows: list[Row], path: Path) -> list[Path]:
    """Write PNGs of `rows` to `path` and, if a backward was measured, to `<stem>-training.png` beside it.

    Wrong, failed and skipped providers have no line. Returns what was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    training = [row for row in rows if row["op"] in TRAINING_OPS]
    forward = [row for row in rows if row["op"] not in TRAINING_OPS]
    pictures = [(forward, path), (training, path.with_name(f"{path.stem}-training.png"))]
    for mine, where in pictures:
        if mine:
            _picture(mine, where)
    return [where for mine, where in pictures if mine]


def _picture(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    panels = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    ops = list(dict.fromkeys(op for op, _ in panels))
    columns = max(sum(op == each for each, _ in panels) for op in ops)
    figure, axes = plt.subplots(
        len(ops), columns, figsize=(1.2 + 4.2 * columns, 1.3 + 3.3 * len(ops)), squeeze=False, layout="constrained"
    )
    for line, op in enumerate(ops):
        modes = [mode for each, mode in panels if each == op]
        for place in range(columns):
            axis = axes[line][place]
            if place >= len(modes):
                axis.set_visible(False)
                continue
            _panel(axis, [row for row in rows if (row["op"], row["mode"]) == (op, modes[place])])
            title = "any routing" if op == "route" else f"{modes[place]} routing"
            axis.set_title(f"{op}, {title}", fontsize=11)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_xlabel("tokens")
            if place == 0:
                axis.set_ylabel("milliseconds")
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [name for name in (*NAMES, "floor") if name in handles]
    columns = min(6, len(labels))
    figure.legend([handles[name] for name in labels], labels, loc="outside lower center", ncols=columns)
    first = rows[0]
    figure.suptitle(
        f"{first['device']}, {first['threads']} threads, {first['dtype']},"
        f" H={first['shape'][0]} I={first['shape'][1]} E={first['shape'][2]} K={first['shape'][3]}"
        f" ({first['date']})",
        fontsize=12,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, rows: list[Row]) -> None:
    for name in NAMES:
        mine = [row for row in rows if row["provider"] == name and row["p50_ms"]]
        if mine:
            colour, marker, width = STYLES[name]
            tokens = [row["tokens"] for row in mine]
            axis.plot(
                tokens,
                [row["p50_ms"] for row in mine],
                color=colour,
                marker=marker,
                linewidth=width,
                markersize=5,
                label=name,
                zorder=3 if name == OURS else 2,
            )
            axis.fill_between(
                tokens, [row["p20_ms"] for row in mine], [row["p80_ms"] for row in mine], color=colour, alpha=0.12, lw=0
            )
    floor = {row["tokens"]: row["floor_ms"] for row in rows}
    axis.plot(list(floor), list(floor.values()), color="black", linestyle=(0, (4, 2)), linewidth=1.3, label="floor")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(floor), [str(tokens) for tokens in floor])
    axis.grid(which="major", alpha=0.3)
