"""Whether a run on disk is what its manifest says, and its counts what its tokens say."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from .checks import find_bad_row, is_no_count, is_sorted
from .columns import LABEL, check_file
from .counting import count_picks
from .documents import counts_of, read_docs
from .layout import has_live_writer, meta_fault
from .manifest import DATA, MANIFEST, manifest_faults, read_manifest, uncommitted
from .records import PHASES, Records, unrouted_fault
from .whole import Rows

if TYPE_CHECKING:
    from .run import Run


def verify(run: "Run", progress: bool) -> list[str]:
    """The sentences of `Run.verify`."""
    faults = _directory(run)
    intact = []
    for index, segment in enumerate(tqdm(run.segments, "checksums", disable=not progress, unit="file")):
        try:
            check_file(run.path, segment.part)
            check_file(run.path, segment.docs)
        except ValueError as error:
            faults.append(str(error))
        else:
            intact.append(index)
    check = _Check(run, intact)
    for index in tqdm(intact, "contents", disable=not progress, unit="file"):
        try:
            faults += check.segment(index)
        except ValueError as error:
            faults.append(str(error))
    faults += check.across()
    nan = unrouted_fault(run.layers, check.unrouted.tolist())
    return faults if nan is None else [*faults, f"{run.path}: {nan}"]


def _directory(run: "Run") -> list[str]:
    """What lies beside the files of the manifest and is not under way in a live writer; lines listed twice."""
    file = run.path / MANIFEST
    locks = (re.fullmatch(r"writer-(\d+)\.lock", entry.name) for entry in run.path.iterdir())
    live = {int(lock[1]) for lock in locks if lock and has_live_writer(run.path, int(lock[1]))}
    faults = [fault for fault in (meta_fault(run.path), *manifest_faults(run.path)) if fault]
    for name in uncommitted(run.path, read_manifest(run.path)):
        match = DATA.fullmatch(name)
        if match and int(match[2]) not in live:
            faults.append(
                f"{run.path / name}: not in the manifest, left by a writer that did not finish; opening a writer of"
                f" rank {match[2]} removes it."
            )
    if not live and file.exists() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        whole = len(read_manifest(run.path)) > text.count(b"\n")
        fault = "has lost its newline" if whole else "is torn and was ignored"
        faults.append(f"{file}: the last line {fault}; opening a writer {'mends' if whole else 'cuts'} it.")
    places = Counter((segment.rank, segment.seq) for segment in run.segments)
    return faults + [f"{file}: rank {r}, seq {s} is listed {n} times." for (r, s), n in places.items() if n > 1]


class _Check:
    """Segments against themselves, and documents that lie in several of them against each other."""

    def __init__(self, run: "Run", segments: list[int]) -> None:
        self._run = run
        self._rows = Rows(run, None, run.record)
        seen = [np.empty(0, np.int64)]
        for index in segments:
            seen += [table["doc_id"].to_numpy() for table in read_docs(run.path, run.segments[index], counts=False)]
        ids, times = np.unique(np.concatenate(seen), return_counts=True)
        self._shared = ids[times > 1]
        self._spans: list[NDArray[np.int64]] = []  # of shared documents [4, n]: document, first position, end, segment
        self.unrouted = np.zeros(len(run.layers), np.int64)
        self._texts: dict[tuple[int, str], tuple[str, str]] = {}  # document, column -> value, file

    def segment(self, index: int) -> list[str]:
        """Sentences about one segment, the first fault of each sort."""
        run, segment = self._run, self._run.segments[index]
        part, docs = run.path / segment.part.name, run.path / segment.docs.name
        tables = list(read_docs(run.path, segment, counts=False))
        ids = np.concatenate([np.empty(0, np.int64), *(table["doc_id"].to_numpy() for table in tables)])
        tokens = np.concatenate([np.empty(0, np.int64), *(table["n_tokens"].to_numpy() for table in tables)])
        faults = [text for table in tables for text in self._compare_texts(table, docs)]
        rows = self._rows.edges(index)[-1]
        if len(ids) != segment.documents:
            faults.append(f"{docs}: expected {segment.documents} documents as the manifest says, found {len(ids)}.")
        if (np.diff(ids) <= 0).any():
            return [*faults, f"{docs}: expected documents ascending by id, each once, found another order."]
        counts_only = not rows and not segment.tokens and not run.record  # `Writer.add_counts`
        if not rows == segment.tokens == tokens.sum() and not counts_only:
            wanted = f"the {segment.tokens} tokens of the manifest, {int(tokens.sum())} by its documents"
            return [*faults, f"{part}: expected {wanted}, found {rows}."]
        edges = np.append(0, np.cumsum(np.zeros_like(tokens) if counts_only else tokens))
        last = np.empty(0, np.int64), np.empty(0, np.int32)
        before = self.unrouted.copy()
        first = at = 0
        for table in read_docs(run.path, segment, counts=True):
            stop = first + table.num_rows
            found = np.zeros((stop - first, len(run.layers), run.num_experts), np.int32)
            for records in self._rows.read(index, int(edges[first]), int(edges[stop])):
                row = np.arange(at, at + len(records))
                slot = np.searchsorted(edges, row, "right") - 1  # which document has the row by its docs file
                texts = [f"{part}: {text}" for text in self._tokens(records, ids[slot], last)]
                if texts:
                    return faults + texts
                at += len(records)
                self._note_spans(records, index)
                last = records.doc[-1:], records.pos[-1:]
                if "ids" in run.record:
                    found += count_picks(records.ids, slot - first, len(found), run.num_experts)
            faults += self._compare_counts(table, found, tokens[first:stop], docs)
            first = stop
        lost = self.unrouted - before
        if not np.array_equal(lost, segment.unrouted or np.zeros_like(before)):
            faults.append(
                f"{docs}: expected tokens without routing by layer, {list(segment.unrouted)} as the manifest says,"
                f" found {lost.tolist()}."
            )
        return faults

    def _tokens(
        self, records: Records, wanted: NDArray[np.int64], last: tuple[NDArray[np.int64], NDArray[np.int32]]
    ) -> Iterator[str]:
        """Sentences about some rows of a part file.

        Args:
            wanted: the document of each row by the docs file.
            last: doc and pos of the row before them, if there is one.
        """
        doc, pos = np.append(last[0], records.doc), np.append(last[1], records.pos)
        if (records.doc != wanted).any():
            row = int((records.doc != wanted).argmax())
            yield f"expected a token of document {wanted[row]} as its docs file says, found one of {records.doc[row]}."
        elif not is_sorted(doc, pos):
            yield "expected rows ascending by (doc_id, pos), found another order."
        elif ((np.diff(doc) == 0) & (np.diff(pos) == 0)).any():
            row = int(((np.diff(doc) == 0) & (np.diff(pos) == 0)).argmax())
            yield f"expected each position once, found document {doc[row]}, position {pos[row]} twice."
        if (records.pos < 0).any() or (records.phase >= len(PHASES)).any():
            yield f"expected positions >= 0 and phases < {len(PHASES)}, found another number."
        bad = (
            find_bad_row(records.ids, self._run.num_experts, self._run.experts_by_layer)
            if "ids" in self._run.record
            else None
        )
        if bad is not None:
            layer, token = bad
            yield (
                f"expected different experts in [0, {self._run.num_experts}), found {records.ids[bad].tolist()} in"
                f" layer {self._run.layers[layer]}, document {records.doc[token]}, position {records.pos[token]}."
            )

    def _compare_counts(
        self, table: pa.Table, found: NDArray[np.int32], tokens: NDArray[np.int64], docs: Path
    ) -> Iterator[str]:
        try:
            counts = counts_of(table, found.shape[1:])
        except ValueError as error:
            yield f"{docs}: {error}"
            return
        picks = (found if "ids" in self._run.record else counts).sum(axis=2, dtype=np.int64)
        if "ids" in self._run.record:
            wrong = (counts != found).any(axis=2)
        else:  # nothing to count again, but a token picks K experts, or none
            wrong = is_no_count(picks, tokens, self._run.top_k)
        self.unrouted += tokens.sum() - picks.sum(axis=0) // self._run.top_k
        if wrong.any():
            doc, layer = np.argwhere(wrong)[0]
            yield (
                f"{docs}: expected counts equal to those of the tokens, found others in {int(wrong.any(axis=1).sum())}"
                f" documents, first document {table['doc_id'][int(doc)]}, layer {self._run.layers[layer]}."
            )

    def _compare_texts(self, table: pa.Table, docs: Path) -> Iterator[str]:
        ids, tokens = table["doc_id"].to_numpy(), table["n_tokens"].to_numpy()
        for row in np.flatnonzero(np.isin(ids, self._shared)).tolist():
            for name in table.column_names:
                value = table[name][row].as_py()
                if value is None or not (name == "text_hash" or name.startswith(LABEL)):
                    continue
                earlier, file = self._texts.setdefault((int(ids[row]), name), (value, docs.name))
                if earlier != value:
                    if tokens[row] or name == "text_hash":  # without tokens a label is corrected: `Writer.relabel`
                        yield (
                            f"{docs}: document {ids[row]} has {name.removeprefix(LABEL)} {value!r}, but {earlier!r} in"
                            f" {file}; the later one is used."
                        )
                    self._texts[int(ids[row]), name] = value, docs.name

    def _note_spans(self, records: Records, segment: int) -> None:
        """Keep which positions of shared documents lie here, as runs of consecutive ones."""
        some = records.take(np.isin(records.doc, self._shared))
        if not len(some):
            return
        breaks = np.flatnonzero((np.diff(some.doc) != 0) | (np.diff(some.pos) != 1))
        starts, ends = np.append(0, breaks + 1), np.append(breaks, len(some) - 1)
        here = np.full(len(starts), segment)
        self._spans.append(np.stack([some.doc[starts], some.pos[starts], some.pos[ends].astype(np.int64) + 1, here]))

    def across(self) -> list[str]:
        """Sentences about positions that two segments hold."""
        doc, start, end, segment = np.concatenate([np.empty((4, 0), np.int64), *self._spans], axis=1)
        order = np.lexsort((start, doc))
        doc, start, end, segment = doc[order], start[order], end[order], segment[order]
        twice = np.flatnonzero((doc[1:] == doc[:-1]) & (start[1:] < end[:-1]) & (segment[1:] != segment[:-1]))
        files = (
            [self._run.path / self._run.segments[index].part.name for index in segment.tolist()] if len(twice) else []
        )
        return [
            f"{files[i + 1]}: expected each position once, found document {doc[i + 1]}, position {start[i + 1]} also in"
            f" {files[i].name}."
            for i in twice.tolist()
        ]
