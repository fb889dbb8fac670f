"""Documents into a new run, one after the other."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..beside import new_directory
from ..records import PHASES, Records, id_dtype, text_hash, unrouted
from ..store import Writer

Labels = Mapping[str, str] | Sequence[Mapping[str, str]] | None


class Builder:
    """Adds whole documents to the writer of a new run."""

    def __init__(self, writer: Writer, labels: Labels) -> None:
        self._writer, self._labels = writer, labels
        self._docs: set[int] = set()
        self.layers: list[int] = writer.meta["layers"]
        self._experts: int = writer.meta["num_experts"]

    def __len__(self) -> int:
        return len(self._docs)

    def add(
        self,
        where: str,
        ids: NDArray[Any],
        token: Any = None,
        *,
        own: Mapping[str, Any],
        pos: Any = None,
        phase: Any = None,
        **kinds: NDArray[np.float16],
    ) -> None:
        """Add the next document of the source.

        Args:
            where: words that name it in errors.
            ids: [n, L, K] integers of any width.
            token: [n] token ids; None if the source does not say.
            own: its doc_id, text_hash, labels, pos, phase, as far as the source says; without text_hash it is computed
                from the token ids, if all are known.
            pos: [n] positions if `own` has none, by default from 0.
            phase: [n] positions in PHASES if `own` has none, by default prefill.
            kinds: weights [n, L, K], stats [n, L, 3], fp16.

        Raises:
            ValueError, TypeError: what does not fit.
        """
        n = len(ids)
        doc = self._number(own.get("doc_id", len(self)), where)
        pos = own.get("pos", np.arange(n) if pos is None else pos)
        phase = own.get("phase", np.zeros(n) if phase is None else phase)
        tokens = np.full(n, -1, np.int32) if token is None else integers(token, n, np.int32, f"{where}: token ids")
        records = Records(
            np.full(n, doc, np.int64),
            integers(pos, n, np.int32, f"{where}: positions"),
            tokens,
            integers(phase, n, np.uint8, f"{where}: phases"),
            as_ids(ids, self._experts, where).transpose(1, 0, 2),
            **{kind: array.transpose(1, 0, 2) for kind, array in kinds.items()},
        )
        hashed = own["text_hash"] if "text_hash" in own else text_hash(tokens) if n and (tokens >= 0).all() else None
        try:
            self._writer.add(records, {doc: self.labels(own, where)}, {} if hashed is None else {doc: hashed})
        except (ValueError, TypeError) as error:
            raise _named(error, where) from None
        self._docs.add(doc)

    def add_counts(
        self, where: str, counts: NDArray[np.int32], n_tokens: NDArray[np.int64], own: Sequence[Mapping[str, str]]
    ) -> None:
        """Add all documents of a source that has but counts [D, L, E] and tokens [D]; `own` are their labels."""
        labels = {}
        for doc, found in enumerate(own):
            labels[doc] = self.labels({"labels": dict(found)}, where)
            self._docs.add(doc)
        self.finish()
        try:
            self._writer.add_counts(np.arange(len(own), dtype=np.int64), counts, n_tokens, labels)
        except (ValueError, TypeError) as error:
            raise _named(error, where) from None

    def labels(self, own: Mapping[str, Any], where: str) -> dict[str, str]:
        """Labels of the next document: those of the source, and over them the caller's."""
        found = own.get("labels", {})
        if not isinstance(found, dict):
            raise ValueError(f"{where}: expected labels to be an object, got {type(found).__name__}.")
        given = self._labels
        if isinstance(given, Sequence):
            if len(self) >= len(given):
                raise ValueError(f"labels: expected one mapping for each document, got {len(given)} for more of them.")
            given = given[len(self)]
        return {**found, **(given or {})}

    def finish(self, documents: Any = None) -> None:
        """Check that there were as many documents as the source, and as the caller's labels, say.

        Raises:
            ValueError: there were not, or none at all.
        """
        if not self._docs:
            raise ValueError("source: expected at least one document, found none.")
        if documents is not None and documents != len(self):
            raise ValueError(
                f"source: expected {documents} documents, as it says, found {len(self)}; it was truncated."
            )
        if isinstance(self._labels, Sequence) and len(self._labels) != len(self):
            raise ValueError(f"labels: expected {len(self)} mappings, one for each document, got {len(self._labels)}.")

    def _number(self, doc: Any, where: str) -> int:
        if not isinstance(doc, int) or isinstance(doc, bool) or not 0 <= doc < 1 << 63:
            raise ValueError(f"{where}: expected a document id >= 0, got {doc!r}.")
        if doc in self._docs:
            raise ValueError(f"{where}: expected every document once, got document {doc} again.")
        return doc


@contextmanager
def new_run(
    path: str | os.PathLike[str], meta: Mapping[str, Any], labels: Labels, record: Sequence[str] = ("ids",)
) -> Iterator[Builder]:
    """A run built beside `path`, which gets its name at the end of the block.

    Raises:
        FileExistsError: something is at `path`.
    """
    with new_directory(path) as beside, Writer(beside, meta, record=record) as writer:
        yield Builder(writer, labels)
        writer.close()


def _named(error: Exception, where: str) -> Exception:
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}")


def integers(values: Any, n: int, dtype: Any, where: str) -> NDArray[Any]:
    """[n] integers, checked before they are cast.

    Raises:
        ValueError: another length, no integers, numbers that `dtype` does not hold.
    """
    try:
        array = np.asarray(values if len(values) else np.empty(0, dtype))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected integers, got an error: {error}.") from None
    if array.shape != (n,):
        raise ValueError(f"{where}: expected {n}, one for each token with a decision, got shape {list(array.shape)}.")
    if not np.issubdtype(array.dtype, np.number) or (array != np.floor(array)).any():
        raise ValueError(f"{where}: expected integers, got dtype {array.dtype}.")
    limits = np.iinfo(dtype)
    if n and not (array.min() >= limits.min and array.max() <= limits.max):
        raise ValueError(f"{where}: expected numbers up to {limits.max}, got {array.min()} to {array.max()}.")
    return array.astype(dtype)


def as_ids(ids: NDArray[Any], num_experts: int, where: str) -> NDArray[Any]:
    """Expert ids in the store's dtype, checked before they are cast: 256 must not become 0.

    Raises:
        TypeError: no integers.
        ValueError: ids that are no experts.
    """
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{where}: expected integer expert ids, got dtype {ids.dtype}.")
    strange = ids[((ids < 0) | (ids >= num_experts)) & (ids != unrouted(num_experts))]
    if strange.size:
        bad = int(strange.min()) if strange.min() < 0 else int(strange.max())
        raise ValueError(f"{where}: expected expert ids in [0, {num_experts}), got {bad}; check num_experts.")
    return np.ascontiguousarray(ids, id_dtype(num_experts))


def phase_number(name: str) -> int:
    """Position of a phase in PHASES."""
    if name not in PHASES:
        raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {name!r}.")
    return PHASES.index(name)
