"""Reading a run: documents and counts at once, tokens lazily, by SQL or in batches of bounded memory."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import layout, manifest
from .columns import blob_type, column, from_blob, opened_part, part_schema
from .counting import count_picks
from .documents import Documents, add_counts, gather, read_docs
from .records import KINDS, Records, unrouted_fault

Counted = tuple[NDArray[np.int64], NDArray[np.int64]]  # documents [d], their counts [d, L, E]
Map = Callable[[Callable[[manifest.Segment], Counted], Sequence[manifest.Segment]], Iterable[Counted]]

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .sql import Database

_READERS = 2  # threads of `histogram`: one row group in memory for each


def open_trace(path: str | os.PathLike[str]) -> "Run":
    """Open a run directory as it is now; a run that nothing was committed to has no documents.

    Warns of damage that reading survives, and of layers whose router gave NaN to some tokens.

    Raises:
        FileNotFoundError, NotADirectoryError: no directory at `path`.
        ValueError: no run, a damaged one, or one of a newer format.
    """
    directory = Path(path)
    run = Run(directory, layout.read_meta(directory), manifest.read_manifest(directory))
    nan = unrouted_fault(run.layers, run.unrouted.tolist())
    faults = (layout.meta_fault(directory), *manifest.manifest_faults(directory), nan and f"{directory}: {nan}")
    for fault in faults:
        if fault:
            warnings.warn(fault, stacklevel=2)
    return run


class Run:
    """The committed segments of a run at the time it was opened.

    Attributes:
        path: the directory; name: its name, which stands for the run in tables.
        meta: what meta.json holds.
        layers: decoder indices of the L layers, in the order of every array; num_experts: E, that of the layer with
            most; top_k: K.
        record: which of "ids", "weights", "stats" are there beside the counts.
        segments: the lines of the manifest.
    """

    def __init__(self, path: Path, meta: dict[str, Any], segments: list[manifest.Segment]) -> None:
        self.path, self.meta, self.segments = path, meta, segments
        self.name = path.resolve().name
        self.layers: list[int] = meta["layers"]
        self.num_experts: int = meta["num_experts"]
        self.top_k: int = meta["top_k"]
        self.record: tuple[str, ...] = tuple(meta["record"])

    @property
    def labels(self) -> list[str]:
        """Names of the documents' labels."""
        return sorted(self.gathered.labels)

    @property
    def experts_by_layer(self) -> list[int]:
        """[L] experts of each layer, `num_experts` where meta.json does not tell them apart: the last columns of
        `counts` stay 0 where a layer has fewer."""
        by_layer: list[int] = self.meta.get("experts_by_layer", [self.num_experts] * len(self.layers))
        return by_layer

    @property
    def dropped(self) -> int:
        """Tokens that were not recorded, because more waited for the writer than the trace's budget allowed."""
        return sum(segment.dropped for segment in self.segments)

    @property
    def unrouted(self) -> NDArray[np.int64]:
        """[L] tokens for which a layer's router gave NaN, so that no expert was chosen: they are in no count of it.

        Of single documents: `n_tokens` less the picks over K. Such a token's ids are all 254, or 65534 where there are
        more than 254 experts; its weights and statistics are NaN.
        """
        total = np.zeros(len(self.layers), np.int64)
        for segment in self.segments:
            if len(segment.unrouted) not in (0, len(total)):
                raise ValueError(
                    f"{self.path / manifest.MANIFEST}: expected unrouted tokens of {len(total)} layers, got"
                    f" {list(segment.unrouted)} in segment {segment.seq} of rank {segment.rank}."
                )
            total += np.array(segment.unrouted or 0, np.int64)
        return total

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}: {len(self.gathered)} documents, {self.gathered.n_tokens.sum()} tokens,"
            f" {len(self.layers)} layers, {self.num_experts} experts, top {self.top_k})"
        )

    @cached_property
    def gathered(self) -> Documents:
        """The documents as arrays."""
        return gather(table for segment in self.segments for table in read_docs(self.path, segment, counts=False))

    @cached_property
    def documents(self) -> "pd.DataFrame":
        """One row per document, ascending by doc_id: doc_id, n_tokens, text_hash, then one column per label."""
        import pandas as pd

        known = self.gathered
        texts = {"text_hash": known.text_hash, **known.labels}
        columns = {name: pd.Series(values, dtype=object) for name, values in texts.items()}
        return pd.DataFrame({"doc_id": known.doc_ids, "n_tokens": known.n_tokens, **columns})

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """[D, L, E] picks of each expert by each document, rows as in `documents`: K of each token that was routed."""
        total = np.zeros((len(self.gathered), len(self.layers), self.num_experts), np.int64)
        for segment in self.segments:
            add_counts(total, self.gathered.doc_ids, read_docs(self.path, segment, counts=True))
        return total

    def tokens(self, layer: int | None = None, where: str | None = None) -> "duckdb.DuckDBPyRelation":
        """The tokens as a lazy DuckDB relation: doc_id, pos, token_id, phase, layer, ids [, weights, stats] as lists.

        Args:
            layer: decoder index; None for all layers, one row per token and layer.
            where: SQL condition over these columns and those of `documents`.
        """
        if layer is not None:
            self.positions([layer])
        return self.database.tokens(layer, where)

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """Run a query over tokens, documents and counts(doc_id, layer, expert, picks), lazily where DuckDB can.

        A condition on `layer` skips the columns of the others. DuckDB reads no checksums: `verify` does.
        """
        return self.database.sql(query)

    @cached_property
    def database(self) -> "Database":
        """The run in DuckDB."""
        from .sql import Database

        return Database(self)

    def part_schema(self) -> "pa.Schema":
        """Columns of the part files."""
        return part_schema(self.layers, self.num_experts, self.top_k, self.record)

    def opened(self, segment: manifest.Segment) -> AbstractContextManager["pq.ParquetFile"]:
        """The part file of a segment, open; errors in the block name it."""
        return opened_part(self.path, segment.part, self.part_schema())

    def positions(self, layers: Sequence[int] | None) -> list[int]:
        """Where decoder indices stand in `layers`; all of them for None.

        Raises:
            ValueError: a layer that was not recorded.
        """
        where = {layer: position for position, layer in enumerate(self.layers)}
        missing = [layer for layer in layers or () if layer not in where]
        if missing:
            raise ValueError(f"layers: expected decoder indices among {self.layers}, got {missing[0]!r}.")
        return list(where.values()) if layers is None else [where[layer] for layer in layers]

    def batches(
        self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",), where: str | None = None
    ) -> Iterator[Records]:
        """The records one row group (at most 64K tokens) at a time, sorted by (doc, pos) within each.

        Args:
            layers: decoder indices, in the order wanted; None for all.
            kinds: which of "ids", "weights", "stats" to read; without "ids" the records' ids are [L, n, 0].
            where: SQL condition over doc_id, pos, token_id, phase and the columns of `documents`.

        Raises:
            ValueError: a layer or kind that was not recorded, a damaged file.
        """
        self.positions(layers)
        self.check_kinds(kinds)
        return self._batches(layers, kinds, where)

    def _batches(self, layers: Sequence[int] | None, kinds: Sequence[str], where: str | None) -> Iterator[Records]:
        for segment in self.segments:
            with self.opened(segment) as parquet:
                for group in range(parquet.num_row_groups):
                    records = self.read_group(parquet, group, layers, kinds)
                    if where is not None:
                        records = records.take(self.database.rows(records, where))
                    if len(records):
                        yield records

    def check_kinds(self, kinds: Sequence[str]) -> None:
        """Raise ValueError if the run does not hold these kinds of records."""
        missing = [kind for kind in kinds if kind not in self.record]
        if isinstance(kinds, str) or missing:
            raise ValueError(f"kinds: expected some of those recorded, {self.record}, got {kinds!r}.")

    def read_group(
        self, parquet: "pq.ParquetFile", group: int, layers: Sequence[int] | None, kinds: Sequence[str]
    ) -> Records:
        """The records in one row group of an opened part file; arguments as for `batches`, checked."""
        wanted = self.layers if layers is None else layers
        names = {kind: [column(kind, layer) for layer in wanted] for kind in KINDS if kind in kinds}
        flat = ("doc_id", "pos", "token_id", "phase")
        table = parquet.read_row_group(group, columns=[*flat, *chain.from_iterable(names.values())], use_threads=False)
        arrays: dict[str, NDArray[Any]] = {}
        for kind in ("ids", *names):
            dtype, values = blob_type(kind, self.num_experts, self.top_k)
            columns = [from_blob(table[name], dtype, values) for name in names.get(kind, ())]
            arrays[kind] = np.stack(columns) if columns else np.empty((len(wanted), table.num_rows, 0), dtype)
        return Records(*(table[name].to_numpy() for name in flat), **arrays)

    def histogram(self, progress: bool = False) -> NDArray[np.int64]:
        """[L, E] picks of each expert, counted from the tokens and not taken from the documents' counts.

        Two row groups are in memory at a time.
        """
        self.check_kinds(("ids",))
        total = np.zeros((len(self.layers), self.num_experts), np.int64)
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(self._count_segment, self.segments)
            for counts in tqdm(found, "counting", len(self.segments), disable=not progress, unit="file"):
                total += counts
        return total

    def _count_segment(self, segment: manifest.Segment) -> NDArray[np.int64]:
        total = np.zeros((len(self.layers), self.num_experts), np.int64)
        dtype, values = blob_type("ids", self.num_experts, self.top_k)
        with self.opened(segment) as parquet:
            for group in range(parquet.num_row_groups):
                names = [column("ids", layer) for layer in self.layers]
                table = parquet.read_row_group(group, columns=names, use_threads=False)
                slot = np.zeros(table.num_rows, np.int64)
                for position, name in enumerate(names):
                    ids = from_blob(table[name], dtype, values)[None]
                    total[position] += count_picks(ids, slot, 1, self.num_experts)[0, 0]
        return total

    def recount(self, map: Map = map) -> NDArray[np.int64]:
        """`counts` [D, L, E] once more, from the tokens and not taken from the docs files, one part file at a time.

        Args:
            map: applies a function to each part file, in any order, as the built-in one does in this thread; that of an
                executor or of a cluster does it elsewhere: `ProcessPoolExecutor().map`, multiprocessing's `pool.imap`,
                `dask.distributed.Client(address).get_executor().map`. There the run must be found under the same
                absolute path, and omnigene_fast be installed. A row group is in a worker's memory at a time; the counts
                of its file's documents come back.

        Raises:
            ValueError: no ids were recorded, a damaged file, tokens of a document that the docs files do not list.
        """
        self.check_kinds(("ids",))
        known = self.gathered.doc_ids
        total = np.zeros((len(known), len(self.layers), self.num_experts), np.int64)
        count = partial(_count_documents, str(self.path.resolve()), self.meta)
        for doc_ids, counts in map(count, self.segments):
            missing = np.setdiff1d(doc_ids, known)
            if len(missing):
                raise ValueError(f"{self.path}: expected tokens of listed documents, got some of {missing[0]}.")
            total[np.searchsorted(known, doc_ids)] += counts
        return total

    def iter_documents(
        self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",), where: str | None = None
    ) -> Iterator[tuple[dict[str, Any], Records]]:
        """Every document with tokens, whole and in order of its positions, also where it lies in several files.

        Documents come in the order in which the run began them. In memory: one document and three row groups.

        Args:
            layers, kinds: as for `batches`.
            where: SQL condition over the columns of `documents`.

        Returns:
            Pairs of the document's row of `documents` and its records.
        """
        from .whole import whole_documents

        self.positions(layers)
        self.check_kinds(kinds)
        return whole_documents(self, layers, kinds, where)

    def verify(self, progress: bool = False) -> list[str]:
        """Read everything back and check it, one row group in memory at a time; routers that gave NaN are a fault too.

        Returns:
            A sentence for each fault found; an empty list if the run is sound.
        """
        from .verify import verify

        return verify(self, progress)


def _count_documents(path: str, meta: dict[str, Any], segment: manifest.Segment) -> Counted:
    """What `Run.recount` has its map do, maybe on another machine: the documents of a part file and their counts."""
    run = Run(Path(path), meta, [segment])
    with run.opened(segment) as parquet:
        doc_ids = np.unique(parquet.read(columns=["doc_id"], use_threads=False)["doc_id"].to_numpy())
        total = np.zeros((len(doc_ids), len(run.layers), run.num_experts), np.int64)
        for group in range(parquet.num_row_groups):
            records = run.read_group(parquet, group, None, ("ids",))
            slot = np.searchsorted(doc_ids, records.doc)
            total += count_picks(records.ids, slot, len(doc_ids), run.num_experts)
    return doc_ids, total
