"""Several runs of one shape as one run."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from . import layout
from .beside import new_directory
from .columns import DOCUMENT_ROWS, LABEL, ROW_GROUP, docs_schema, encode, opened_docs
from .labels import check_text
from .manifest import Segment, write_segment
from .run import Run, open_trace

RUN = "run"  # the label that says which run a document comes from


def merge(
    runs: Sequence[Run | str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> Run:
    """Write runs into a new one: documents renumbered from 0, run after run, with their run's name as label `run`.

    A document that has a label `run` already, since its run was merged, keeps it.

    Args:
        runs: of the same layers, experts, top-k and record kinds.
        path: directory of the new run; it must not exist or be empty.
        names: what the label `run` says for each; by default the names of their directories.
        progress: show a progress bar.

    Raises:
        FileExistsError: something is at `path`.
        ValueError: runs that do not fit together, or two of the same name.
    """
    sources = [run if isinstance(run, Run) else open_trace(run) for run in runs]
    target = Path(path)
    labels = _check(sources, [run.name for run in sources] if names is None else list(names))
    with new_directory(target) as beside:
        layout.create_or_check(beside, _meta(sources, labels))
        _copy(sources, labels, beside, progress)
    return open_trace(target)


def _check(runs: list[Run], names: list[str]) -> list[str]:
    if not runs:
        raise ValueError("runs: expected at least one, got none.")
    for run in runs[1:]:
        for key in ("layers", "num_experts", "experts_by_layer", "top_k", "record"):
            if getattr(run, key) != getattr(runs[0], key):
                raise ValueError(
                    f"runs: expected the same {key}, got {getattr(runs[0], key)} in {runs[0].path} and"
                    f" {getattr(run, key)} in {run.path}."
                )
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise ValueError(
            f"names: expected {len(runs)} different ones, got {names}; pass names= to tell the runs apart."
        )
    for name in names:
        check_text(name, "names: expected each")
    return names


def _meta(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """What the runs have in common, and under "merged" all that they say."""
    first = runs[0].meta
    common = {key: first[key] for key in first if all(run.meta.get(key) == first[key] for run in runs)}
    model = " + ".join(dict.fromkeys(run.meta["model"] for run in runs))
    merged = [{"name": name, "meta": run.meta} for name, run in zip(names, runs, strict=True)]
    return {**common, "format": layout.FORMAT, "model": model, "merged": merged}


def _copy(runs: list[Run], names: list[str], path: Path, progress: bool) -> None:
    first = seq = 0
    with tqdm(total=sum(len(run.segments) for run in runs), desc="merging", disable=not progress, unit="file") as bar:
        for run, name in zip(runs, names, strict=True):
            known = run.gathered.doc_ids
            columns = docs_schema(sorted({*run.gathered.labels, RUN}))
            for segment in run.segments:
                write_segment(
                    path,
                    0,
                    seq,
                    partial(_part, run, segment, known, first),
                    partial(_docs, run, segment, known, first, columns, name),
                    tokens=segment.tokens,
                    documents=segment.documents,
                    dropped=segment.dropped,
                    unrouted=segment.unrouted,
                )
                seq += 1
                bar.update()
            first += len(known)


def _part(run: Run, segment: Segment, known: NDArray[np.int64], first: int) -> pa.Buffer:
    """The part file of a segment; the documents `known` by the run become `first`, `first` + 1, ..."""
    with run.opened(segment) as parquet:
        tables = (_renumber(table, known, first) for table in _row_groups(parquet))
        return encode(run.part_schema(), tables, ROW_GROUP)


def _docs(run: Run, segment: Segment, known: NDArray[np.int64], first: int, schema: pa.Schema, name: str) -> pa.Buffer:
    """The docs file of a segment, renumbered likewise, with the columns of `schema` and its run's name."""

    def complete(table: pa.Table) -> pa.Table:
        columns = []
        for field in schema:
            there = field.name in table.column_names
            values = table[field.name] if there else pa.nulls(table.num_rows, field.type)
            columns.append(values.fill_null(name) if field.name == LABEL + RUN else values)
        return pa.Table.from_arrays(columns, schema=schema)

    with opened_docs(run.path, segment.docs) as parquet:
        tables = (complete(_renumber(table, known, first)) for table in _row_groups(parquet))
        return encode(schema, tables, DOCUMENT_ROWS)


def _row_groups(parquet: pq.ParquetFile) -> Iterator[pa.Table]:
    for group in range(parquet.num_row_groups):
        yield parquet.read_row_group(group, use_threads=False)


def _renumber(table: pa.Table, known: NDArray[np.int64], first: int) -> pa.Table:
    ids = first + np.searchsorted(known, table["doc_id"].to_numpy())
    return table.set_column(0, pa.field("doc_id", pa.int64(), False), pa.array(ids, pa.int64()))
