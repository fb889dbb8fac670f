"""`python -m omnigene_fast.bench.simulations [--worlds N] [--only WORD] [--out FILE]`: the table, as JSON and text."""

import importlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
import torch
from tqdm import tqdm

from .cells import Cell, Figure, simulate

MODULES = ("level", "coverage", "pairs")  # each has a function cells() -> list[Cell]


def cells() -> list[Cell]:
    """Every cell of the table."""
    return [cell for name in MODULES for cell in importlib.import_module(f".{name}", __package__).cells()]


def _simulate(number: int, worlds: int) -> list[Figure]:
    return simulate(cells()[number], worlds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--worlds", default=200, show_default=True, type=click.IntRange(min=2), help="Per cell.")
@click.option("--only", default="", help="Cells whose measure or setting has this text.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; its rows of other cells stay.")
def main(worlds: int, only: str, processes: int, out: Path | None) -> None:
    """Level, coverage and floors of the measures in simulated worlds with a known truth. Exits with 1 if one fails."""
    chosen = [number for number, cell in enumerate(cells()) if only in f"{cell.measure}, {cell.setting}"]
    if not chosen:
        raise click.ClickException(f"--only: expected a part of a cell's name, got {only!r}, which none has.")
    rows: list[Figure] = []
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = [pool.submit(_simulate, number, worlds) for number in chosen]
        for future in tqdm(found, unit="cell"):
            rows += future.result()
    for row in rows:
        mark = "" if row.holds else f"   OUTSIDE {row.low:g} to {row.high:g}"
        click.echo(f"{row.measure} | {row.setting} | {row.figure}: {row.mean:.3f} +- {row.error:.3f}{mark}")
    if out is not None:
        mine = {(row.measure, row.setting, row.figure) for row in rows}
        kept = json.loads(out.read_text()) if out.exists() else []
        kept = [row for row in kept if (row["measure"], row["setting"], row["figure"]) not in mine]
        every = sorted([*kept, *map(asdict, rows)], key=lambda row: (row["measure"], row["setting"], row["figure"]))
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps(every, indent=1) + "\n")
        new.replace(out)
    raise SystemExit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
