"""Documents in groups: what every measure of counts begins with."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..tracing.records import Records

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger("omnigene_fast")

UNITS = {"nats": 1.0, "bits": float(1 / np.log(2))}  # a value in nats times this
MOST_GROUPS = 50  # of measures of pairs: 1,225 pairs, a minute or so for 30 layers
_CHUNK = 1 << 20  # float64 elements that one step over documents or permutations holds: those that fit a cache


class RunLike(Protocol):
    """What a measure needs of a run (`omnigene_fast.open_trace` returns one)."""

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def counts(self) -> NDArray[Any]: ...
    @property
    def documents(self) -> "pandas.DataFrame": ...
    def batches(self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",)) -> Iterator[Records]: ...
    def iter_documents(
        self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",)
    ) -> Iterator[tuple[dict[str, Any], Records]]: ...


def distinct(runs: Sequence[Any]) -> list[str]:
    """Names of the runs, all different: with as much of their paths as tells those of one name apart, or numbered."""
    names = [str(run.name) for run in runs]
    paths = [Path(getattr(run, "path", None) or name).absolute().parts for run, name in zip(runs, names, strict=True)]
    for name in set(names):
        alike = {path for path, each in zip(paths, names, strict=True) if each == name}
        depths = range(2, max(map(len, alike)) if len(alike) > 1 else 2)
        depth = next((n for n in depths if len({path[-n:] for path in alike}) == len(alike)), None)
        if depth is not None:
            names = [str(Path(*p[-depth:])) if each == name else each for p, each in zip(paths, names, strict=True)]
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in range(2, len(names) + 2))
        found.append(name if name not in found else next(each for each in numbered if each not in found))
    return found


@dataclass
class Groups:
    """The documents of a run that carry a label, by its values. Documents without a token are left out.

    Documents of one group with the same text (`text_hash`) are one, with the counts of all: a copy is no new evidence.
    """

    names: list[str]  # sorted
    rows: list[NDArray[np.int64]]  # per group, rows of `counts`; without copies of a text, of run.documents too
    counts: NDArray[Any]  # [D, L, E] of the run, each text's in the row of its first document; see `equal_weights` too
    sums: NDArray[np.float64]  # [G, L, E]
    layers: list[int]
    top_k: int

    @property
    def docs(self) -> list[int]:
        """Documents per group."""
        return [len(rows) for rows in self.rows]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[G] tokens per group, those of its best recorded layer."""
        return (self.sums.sum(-1).max(-1) / self.top_k).round().astype(np.int64)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """[G, L, E] share of the picks of a group and layer."""
        return self.sums / self.sums.sum(-1, keepdims=True)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions (a, b), a < b, of every two groups."""
        return [(a, b) for a in range(len(self.names)) for b in range(a + 1, len(self.names))]

    def sizes(self, group: int) -> NDArray[Any]:
        """[n] picks of each document of a group, in all layers."""
        return total(self.counts[self.rows[group]], (1, 2))

    def without_one(self, group: int) -> Iterator[NDArray[np.float64]]:
        """Counts [n, L, E] of a group when each of its documents in turn is left out, in chunks of documents."""
        rows, size = self.rows[group], max(1, _CHUNK // self.sums[group].size)
        for start in range(0, len(rows), size):
            yield self.sums[group] - self.counts[rows[start : start + size]]


def group(
    run: RunLike,
    by: str | None,
    minimum: int = 1,
    most: int | None = None,
    hashes: "pandas.Series | None" = None,
    varying: bool = False,
) -> Groups:
    """The groups of a run.

    Args:
        run: an opened trace.
        by: name of a label, or None for one group "all" of every document.
        minimum: how many groups the measure needs.
        most: how many it can take, `MOST_GROUPS` where it compares every two.
        hashes: of the documents' texts, if other ones than the run's.
        varying: the measure knows of layers with fewer experts than others.

    Raises:
        ValueError: no such label, layers with different numbers of experts, too few or too many groups, or a group
            without a pick in a layer where others have some. A layer without any, since its router gave NaN, is left
            out with a warning.
    """
    if not varying:
        check_equal_experts(run)
    if getattr(run, "given", by) != by:
        raise ValueError(f"by: expected the label {run.given!r} of given_tokens, got {by!r}.")  # type: ignore[attr-defined]
    counts, documents = run.counts, run.documents
    filled = counts.any(axis=(1, 2))
    labels = label_column(run, by) if by is not None else ["all"] * len(documents)
    present = np.array([label is not None for label in labels], bool) & filled
    names = sorted({label for label, kept in zip(labels, present, strict=True) if kept and label is not None})
    if len(names) < minimum:
        raise ValueError(
            f"by: expected a label with at least {minimum} values among documents with tokens,"
            f" got {names!r} for {by!r}."
        )
    if most is not None and len(names) > most:
        raise ValueError(
            f"by: expected a label with at most {most} values, of which every two are compared, got {len(names)} of"
            f" {by!r} in run {run.name!r}; choose a coarser label."
        )
    where: dict[str, list[int]] = {name: [] for name in names}
    for row in np.flatnonzero(present):
        where[str(labels[row])].append(int(row))
    rows = [np.array(where[name], np.int64) for name in names]
    hashes = documents.get("text_hash") if hashes is None else hashes
    if hashes is not None:
        rows, counts = _without_copies(rows, counts, hashes.to_numpy(object), str(run.name))
    layers = [int(layer) for layer in run.layers]
    routed = np.any([counts[one].any(axis=(0, 2)) for one in rows], axis=0)
    if not routed.all():
        gone = tuple(layer for layer, kept in zip(layers, routed.tolist(), strict=True) if not kept)
        say_that_layers_are_left_out(str(run.name), gone)
        layers, counts = [layer for layer in layers if layer not in gone], counts[:, routed]
    if weights_of(run) == "documents":
        counts = _alike(rows, counts)
    sums = np.stack([total(counts[one], 0).astype(np.float64) for one in rows])
    empty = np.argwhere(sums.sum(-1) == 0)
    if len(empty):
        raise ValueError(
            f"run: expected picks of every group in every layer, got none of {names[empty[0][0]]!r} in layer"
            f" {layers[empty[0][1]]}."
        )
    return Groups(names, rows, counts, sums, layers, int(run.top_k))


def _without_copies(
    rows: list[NDArray[np.int64]], counts: NDArray[Any], hashes: NDArray[Any], name: str
) -> tuple[list[NDArray[np.int64]], NDArray[Any]]:
    """Rows of the first document of each text in each group, and counts in which these have those of its copies."""
    out, copies = [], 0
    for mine in rows:
        first: dict[str, int] = {}
        kept = []
        for row in mine.tolist():
            text = hashes[row]
            if not isinstance(text, str) or first.setdefault(text, row) == row:
                kept.append(row)
                continue
            if not copies:
                counts = np.array(counts, np.int64 if counts.dtype.kind in "iu" else np.float64)
            counts[first[text]] += counts[row]
            copies += 1
        out.append(np.array(kept, np.int64))
    if copies:
        _say_that_copies_count_once(name, copies)
    return out, counts


def _alike(rows: list[NDArray[np.int64]], counts: NDArray[Any]) -> NDArray[np.float64]:
    """Counts in which each document of a group has the group's mean picks in a layer, with the shares it had."""
    out = np.zeros(counts.shape)
    for mine in rows:
        picks = total(counts[mine], -1)  # [n, L]
        some = np.maximum((picks > 0).sum(0), 1)
        out[mine] = counts[mine] * (picks.sum(0) / some / np.maximum(picks, 1))[..., None]
    return out


def total(counts: NDArray[Any], axis: int | tuple[int, ...]) -> NDArray[Any]:
    """Sum of counts: of whole numbers in int64, of weighted ones in float64."""
    return np.asarray(counts.sum(axis, dtype=np.int64 if counts.dtype.kind in "iu" else np.float64))


@functools.cache
def _say_that_copies_count_once(name: str, copies: int) -> None:
    logger.warning(
        "analysis: %d documents of run %r are copies of a text of their group (same text_hash) and count with it as one"
        " document.",
        copies,
        name,
    )


@functools.cache
def say_that_layers_are_left_out(name: str, layers: tuple[int, ...]) -> None:
    """Warn, once for a run and its layers."""
    logger.warning(
        "analysis: layers %s of run %r are left out: their routers gave NaN, so some or all tokens have no experts.",
        ", ".join(map(str, layers)),
        name,
    )


def experts_by_layer(run: RunLike) -> list[int]:
    """[L] experts of each layer of a run."""
    return list(getattr(run, "experts_by_layer", [run.num_experts] * len(run.layers)))


def check_equal_experts(run: RunLike) -> None:
    """ValueError for a run whose layers have different numbers of experts: absent ones would pass for unused ones."""
    experts = experts_by_layer(run)
    if len(set(experts)) > 1:
        raise ValueError(
            f"run: expected the same number of experts in every layer of {run.name!r}, got {experts}; analysis.load"
            " and Run.counts tell such layers apart."
        )


def share_variances(groups: Groups, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """[G, L, E] variance of a group's shares between samples of its documents; NaN of one document.

    That of the jackknife of ratios, with residuals over 1 - h_d (h_d the document's part of its group's picks), and at
    least half of what the group's dispersion over all experts predicts for the shares `predicted` [G, L, E]: over few
    documents some of many cells vary little by chance, and of an expert that was never seen nothing varies.
    """
    share, out = groups.probabilities, np.empty_like(groups.sums)
    for g, rows in enumerate(groups.rows):
        picks = groups.sums[g].sum(-1)
        own = np.zeros(share.shape[1:])
        for row in rows:
            mine = total(groups.counts[row], -1)
            with np.errstate(invalid="ignore", divide="ignore"):  # a document that is its group
                own += ((groups.counts[row] - share[g] * mine[:, None]) / (picks - mine)[:, None]) ** 2
        dispersion = own.sum(-1) / np.maximum((share[g] * (1 - share[g])).sum(-1) / picks, 1e-300)
        least = np.maximum(dispersion, 1) / picks / 2
        out[g] = np.maximum(own, least[:, None] * predicted[g])
    return np.where(np.isfinite(out), out, np.nan)


def label_column(run: RunLike, by: str) -> list[str | None]:
    """A label of every document, None where it has none.

    Raises:
        ValueError: the run has no such label; the message lists those it has.
    """
    documents = run.documents
    reserved = ("doc_id", "n_tokens", "text_hash")
    if by in reserved or by not in documents.columns:
        known = [str(name) for name in documents.columns if name not in reserved]
        raise ValueError(f"by: expected one of the labels {known!r} of run {run.name!r}, got {by!r}.")
    missing = documents[by].isna()
    return [None if gone else str(value) for value, gone in zip(documents[by], missing, strict=True)]


def weights_of(run: RunLike) -> str:
    """What gives a document its weight: its "tokens", or that it is one of the "documents" (see `equal_weights`)."""
    return str(getattr(run, "weights", "tokens"))


def check_unit(base: str) -> float:
    """What a value in nats is multiplied with to be in `base`; ValueError for another name."""
    if base not in UNITS:
        raise ValueError(f"base: expected 'nats' or 'bits', got {base!r}.")
    return UNITS[base]


def check_permutations(permutations: int) -> None:
    """ValueError unless a count of permutations."""
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise ValueError(f"permutations: expected an integer >= 0, got {permutations!r}.")


def chunk_rows(elements: int) -> int:
    """How many rows of that many float64 elements a loop may hold at once."""
    return max(1, _CHUNK // max(1, elements))
