"""The report: one HTML file that needs nothing else, and the data of its figures beside it as CSV."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..tracing.layout import check_place, naming

if TYPE_CHECKING:
    import pandas

    from .report_tables import Tables
    from .report_tokens import Texts


def report(
    runs: Any,
    out: str | os.PathLike[str] = "report.html",
    *,
    by: str = "task",
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = True,
    texts: "Texts | None" = None,
) -> Path:
    """Write a report on one run or several, such as base, CPT and SFT, or before and after.

    Args:
        runs: an opened trace, or a sequence of them in the order in which they were trained; documents count by their
            tokens, or all the same in the `equal_weights` of runs. The report says which.
        out: the HTML file; what is there is replaced. Its data go to the directory `<stem>_data` beside it.
        by: label that makes the groups.
        permutations: worlds without a difference, for the noise floors and p-values; 0: none.
        seed: of these worlds.
        progress: show a bar.
        texts: from a token id to its text, a function or a mapping, such as `lambda i: tokenizer.decode([i])`. None: as
            the run's meta["tokenizer"] says ("bytes": ids 3..258 are bytes), else ids are shown.

    Returns:
        Path of the HTML file.

    Raises:
        ValueError: no such label, runs that cannot stand side by side, an `out` that does not end in .html.
        OSError: `out` cannot be written; what was there before is as it was.
    """
    path = _checked(out)
    chosen = list(runs) if isinstance(runs, Sequence) else [runs]
    from . import report_sections as parts
    from .groups import check_permutations
    from .report_header import header
    from .report_page import page
    from .report_tables import STEPS, check, collect
    from .report_tokens import examples, painting
    from .report_words import findings

    check_permutations(permutations)
    check(chosen, by)
    with tqdm(total=STEPS * len(chosen) + 2, desc="report", disable=not progress) as bar:

        def step(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        tables = collect(chosen, by, permutations, seed, step)
        step("tokens and page")
        shown = examples(tables, texts)
        painted, html = painting(tables, shown, _busiest_layer(tables)) if len(shown) else (None, "")
        sections = [
            *parts.sections(tables),
            parts.tokens(tables, shown, html),
            parts.balance(tables),
            parts.method(tables, permutations, seed),
        ]
        folder = _folder(path)
        title = f"Router report: {', '.join(tables.names)}"
        text = page(title, header(tables, findings(tables)), sections, folder.name, painted=painted)
        files = {
            folder / name: None if table is None else table.to_csv(index=False)
            for name, table in _files(tables, shown).items()
        }
        _write({**files, path: text})
    return path


def _files(tables: "Tables", shown: "pandas.DataFrame") -> "dict[str, pandas.DataFrame | None]":
    """The CSV files, None for those of what could not be measured; their names are fixed and never come from data."""
    return {
        "load.csv": tables.load,
        "sizes.csv": tables.sizes,
        "specialty.csv": tables.specialty,
        "divergence.csv": tables.pairs,
        "divergence_by_layer.csv": tables.pairs_by_layer,
        "differentiation.csv": tables.differentiation,
        "decomposition.csv": tables.decomposition,
        "flow.csv": tables.flow,
        "tokens.csv": shown if len(shown) else None,
    }


def _busiest_layer(tables: "Tables") -> int:
    """The layer that tells the groups apart best in the last run; the middle one if there is one group."""
    layers: list[int] = list(tables.runs[-1].layers)
    if tables.differentiation is None:
        return layers[len(layers) // 2]
    mine = tables.of(tables.differentiation[tables.differentiation["layer"] != "mean"])
    return int(mine.loc[mine["js"].astype(float).idxmax(), "layer"])


def _checked(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: expected the name of an .html file, got {str(path)!r}.")
    if path.is_dir():
        raise ValueError(f"out: expected the name of a file, got the directory {str(path)!r}.")
    check_place(path)
    folder = _folder(path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a directory for the data, got a file; choose another out.")
    return path


def _folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}_data")


def _write(files: dict[Path, str | None]) -> None:
    """Write all beside, make durable, then rename one by one in this order; what is None and there from before goes.

    A reader sees the old file or the new one, whole; if one cannot be written, nothing changes, and directories that
    were made for it go.
    """
    beside = {path: path.with_name(path.name + ".new") for path, text in files.items() if text is not None}
    made: list[Path] = []
    try:
        for path, new in beside.items():
            missing = [each for each in path.parents if not each.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            made += missing[-1:]
            with naming(path), open(new, "w", encoding="utf-8", newline="") as file:
                file.write(files[path] or "")
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            if path in beside:
                beside[path].replace(path)
            else:
                path.unlink(missing_ok=True)
    except BaseException:
        for new in beside.values():
            new.unlink(missing_ok=True)
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)
        raise
