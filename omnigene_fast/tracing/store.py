"""Writing a run: an open segment in memory, committed segments on disk, nothing in between.

A segment is committed by its line in the manifest, written after both of its files are durable. So `kill -9` at any
moment loses the open segment and nothing else; a writer that reopens the run removes what was under way and appends.
"""

import io
import json
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import layout, manifest
from .checks import check_counts, check_records
from .columns import DOCUMENT_ROWS, ROW_GROUP, blob_type, docs_schema, encode, part_schema
from .documents import Documents, add_counts, gather, read_docs
from .labels import check_labels, check_text
from .records import KINDS, Records
from .segment import OpenSegment, docs_table

DOCS_PER_RANK = 1 << 40  # automatic document ids of a rank: from rank * DOCS_PER_RANK on, so that ranks never meet
_open_writers: "weakref.WeakSet[Writer]" = weakref.WeakSet()


class Writer:
    """Appends records to a run directory; one per process, told apart by `rank`. Calls may come from any thread.

    Attributes:
        next_doc: the first automatic document id that this rank has not used.
        meta: what meta.json holds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: Mapping[str, Any],
        *,
        record: Sequence[str] = ("ids",),
        rank: int = 0,
        segment_tokens: int = ROW_GROUP,
    ) -> None:
        """Create the run, or reopen it to append.

        Args:
            path: directory of the run: new, empty, or a run of the same model, layers, experts and record kinds.
            meta: JSON-serialisable; holds layers (list of L decoder indices), num_experts, top_k, model (text).
            record: which of "ids", "weights", "stats" go to disk beside the counts, which always do.
            rank: number of this process among those that write the run.
            segment_tokens: the open segment is committed when it holds so many; two such calls never share a file.

        Raises:
            FileExistsError: `path` is a file or a directory of something else; nothing was touched.
            ValueError: another run, one of a newer format, or a damaged manifest; nothing was overwritten.
            RuntimeError: another live writer has this rank.
        """
        self._lock = threading.RLock()
        self._held: io.FileIO | None = None
        self._dropped = 0  # tokens since the last commit
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank: expected an integer >= 0, got {rank!r}.")
        if not isinstance(segment_tokens, int) or segment_tokens < 1:
            raise ValueError(f"segment_tokens: expected an integer >= 1, got {segment_tokens!r}.")
        self.path, self.rank, self.segment_tokens = Path(path), rank, segment_tokens
        self.record = _in_order(record)
        self.meta = _plain({**meta, "format": layout.FORMAT, "record": list(self.record)})
        layout.check_meta(self.meta, "meta")
        layout.create_or_check(self.path, self.meta)
        self.meta = layout.read_meta(self.path)
        self._held = layout.lock_writer(self.path, rank)
        layers, experts, top_k = self.meta["layers"], self.meta["num_experts"], self.meta["top_k"]
        self._open = OpenSegment(layers, experts, top_k, self.record, segment_tokens)
        try:
            committed = manifest.recover(self.path, rank)
            documents = self._gather(committed)
        except BaseException:
            self._release()
            raise
        _open_writers.add(self)
        self._seq = 1 + max((segment.seq for segment in committed if segment.rank == rank), default=-1)
        self._label_names = set(documents.labels)
        self.next_doc = rank * DOCS_PER_RANK
        self._advance(documents.doc_ids)

    def add(
        self,
        records: Records,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        hashes: Mapping[int, str] | None = None,
    ) -> None:
        """Take records in, whole: those of one call are committed together. Their memory may be reused afterwards.

        Args:
            records: of n tokens; ids always, weights and stats if the run records them.
            labels: label name -> value per document id; a document without tokens is kept as well.
            hashes: hash of the text per document id.

        Raises:
            ValueError, TypeError: what does not fit; then nothing of the call was kept.
            OSError: the segment could not be written; it stays open with these records, and `commit` tries again.
        """
        labels, hashes = labels or {}, hashes or {}
        shape = self.meta["layers"], self.meta["num_experts"], self.meta["top_k"]
        check_records(records, *shape, self.record, self.meta.get("experts_by_layer"))
        for doc in (*labels, *hashes):
            if doc < 0:
                raise ValueError(f"labels, hashes: expected document ids >= 0, got {doc}.")
        for text_hash in hashes.values():
            check_text(text_hash, "hashes: expected a text hash")
        with self._lock:
            self._check_open()
            names = check_labels(labels, self._label_names)
            try:
                if self._open.tokens and self._open.tokens + len(records) > self.segment_tokens:
                    self.commit()
            finally:  # kept also on a full disk: whoever catches the error cannot know which of the two commits failed
                self._open.append(records, labels, hashes)
                self._label_names |= names
                self._advance(np.concatenate((records.doc, np.fromiter({*labels, *hashes}, np.int64))))
            if self._open.tokens >= self.segment_tokens or len(self._open.labels) >= self.segment_tokens:
                self.commit()

    def add_counts(
        self,
        doc_ids: NDArray[np.int64],
        counts: NDArray[np.int32],
        n_tokens: NDArray[np.int64],
        labels: Mapping[int, Mapping[str, str]] | None = None,
        hashes: Mapping[int, str] | None = None,
    ) -> None:
        """Take in documents of which nothing but the counts is known, as a segment of its own without token rows.

        Args:
            doc_ids: [D] ids >= 0, ascending.
            counts: [D, L, E] picks.
            n_tokens: [D] tokens that made them: K picks of each in every layer, none where its router gave NaN.
            labels, hashes: as for `add`, of these documents.

        Raises:
            ValueError, TypeError: what does not fit, or a run that records tokens; then nothing of the call was kept.
            OSError: the segment could not be written.
        """
        labels, hashes = labels or {}, hashes or {}
        if self.record:
            raise ValueError(
                f"add_counts: expected a run that records no tokens, got record={self.record}; open it with record=()."
            )
        check_counts(doc_ids, counts, n_tokens, self.meta["layers"], self.meta["num_experts"], self.meta["top_k"])
        strange = sorted({*labels, *hashes} - set(doc_ids.tolist()))
        if strange:
            raise ValueError(f"labels, hashes: expected ids among doc_ids, got {strange[0]}.")
        for text_hash in hashes.values():
            check_text(text_hash, "hashes: expected a text hash")
        if not len(doc_ids):
            return
        with self._lock:
            self._check_open()
            names = check_labels(labels, self._label_names)
            self.commit()
            schema = docs_schema(sorted(names))
            blocks = [slice(first, first + DOCUMENT_ROWS) for first in range(0, len(doc_ids), DOCUMENT_ROWS)]
            tables = (docs_table(schema, doc_ids[b], n_tokens[b], counts[b], labels, hashes) for b in blocks)
            part = part_schema(self.meta["layers"], self.meta["num_experts"], self.meta["top_k"], self.record)
            manifest.write_segment(
                self.path,
                self.rank,
                self._seq,
                lambda: encode(part, [part.empty_table()], ROW_GROUP),
                lambda: encode(schema, tables, DOCUMENT_ROWS),
                tokens=0,
                documents=len(doc_ids),
                unrouted=(n_tokens.sum() - counts.sum((0, 2), dtype=np.int64) // self.meta["top_k"]).tolist(),
            )
            self._seq += 1
            self._label_names |= names
            self._advance(doc_ids)

    def relabel(self, labels: Mapping[int, Mapping[str, str]]) -> None:
        """Correct or add labels of documents that are held, durably; a value that is given later counts.

        Args:
            labels: name -> value per document id.

        Raises:
            ValueError, TypeError, OSError: as `add`.
        """
        none, L = np.empty(0, np.int64), len(self.meta["layers"])
        blobs = {}
        for kind in {"ids", *self.record}:
            dtype, values = blob_type(kind, self.meta["num_experts"], self.meta["top_k"])
            blobs[kind] = np.empty((L, 0, values), dtype)
        records = Records(none, none.astype(np.int32), none.astype(np.int32), none.astype(np.uint8), **blobs)
        with self._lock:
            self.add(records, labels)
            self.commit()

    def drop(self, tokens: int) -> None:
        """Note that so many tokens came and were not recorded: `Run.dropped` tells."""
        with self._lock:
            self._check_open()
            self._dropped += tokens

    def commit(self) -> None:
        """Make the open segment durable.

        Raises:
            OSError: it could not be written; it stays open, and the next `commit` tries again.
        """
        with self._lock:
            self._check_open()
            if not self._open and not self._dropped:
                return
            part, docs = self._open.part_table(), self._open.docs_tables()
            manifest.write_segment(
                self.path,
                self.rank,
                self._seq,
                lambda: encode(part.schema, [part], ROW_GROUP),
                lambda: encode(self._open.docs_schema(), docs, DOCUMENT_ROWS),
                tokens=self._open.tokens,
                documents=len(self._open.document_ids()),
                dropped=self._dropped,
                unrouted=self._open.unrouted().tolist(),
            )
            self._seq += 1
            self._dropped = 0
            self._open.clear()

    def documents(self) -> dict[int, int]:
        """Tokens per document id, of all that is committed, by any rank or earlier session, and of the open segment."""
        with self._lock:
            found = self._gather(manifest.read_manifest(self.path))
        return dict(zip(found.doc_ids.tolist(), found.n_tokens.tolist(), strict=True))

    def snapshot(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[dict[str, str]]]:
        """What the run holds now, committed by any rank or earlier session, or in the open segment of this writer.

        Returns:
            Document ids [D], ascending; counts [D, L, E]; labels of each document.
        """
        with self._lock:
            committed = manifest.read_manifest(self.path)
            found = self._gather(committed)
            counts = np.zeros((len(found), len(self.meta["layers"]), self.meta["num_experts"]), np.int64)
            for segment in committed:
                add_counts(counts, found.doc_ids, read_docs(self.path, segment, counts=True))
            add_counts(counts, found.doc_ids, self._open.docs_tables())
        return found.doc_ids, counts, found.label_rows()

    def close(self) -> None:
        """Commit and let go of the run; a closed writer may be closed again."""
        with self._lock:
            if self._held is not None:
                self.commit()
                self._release()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, committed: list[manifest.Segment]) -> Documents:
        tables = (table for segment in committed for table in read_docs(self.path, segment, counts=False))
        return gather(chain(tables, self._open.docs_tables()))

    def _advance(self, doc_ids: NDArray[np.int64]) -> None:
        """Move `next_doc` past the ids that lie in this rank's range."""
        own = doc_ids[(doc_ids >= self.next_doc) & (doc_ids < (self.rank + 1) * DOCS_PER_RANK)]
        if own.size:
            self.next_doc = int(own.max()) + 1

    def _check_open(self) -> None:
        if self._held is None:
            raise RuntimeError(f"{self.path}: expected an open writer, but it was closed; open another one to append.")

    def _release(self) -> None:
        if self._held is not None:
            layout.unlock_writer(self._held)
            self._held = None


def _let_go_in_child() -> None:
    """A forked process, such as a data loader's worker, must not keep the lock of a writer that was killed since."""
    for writer in _open_writers:
        if writer._held is not None:
            writer._held.close()  # and no more: the lock is the parent's
            writer._held = None


os.register_at_fork(after_in_child=_let_go_in_child)


def _in_order(record: Sequence[str]) -> tuple[str, ...]:
    if isinstance(record, str) or not all(kind in KINDS for kind in record):
        raise ValueError(f"record: expected a sequence of {', '.join(KINDS)}, got {record!r}.")
    return tuple(kind for kind in KINDS if kind in record)


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as JSON gives it back."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: expected what JSON can hold, got an error: {error}.") from None
    return plain
