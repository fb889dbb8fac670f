"""What records must be before they are kept, and whether those read back still are."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import PHASES, STATISTICS, Records, id_dtype, unused

_BLOCK = 1 << 17  # ids compared at a time, so that they, their masks and the result stay in the cache


def check_records(records: Records, layers: list[int], num_experts: int, top_k: int, record: tuple[str, ...]) -> None:
    """Check one batch of records.

    Raises:
        ValueError: arrays of other lengths or shapes, a number out of range, an unused slot, an expert picked twice.
        TypeError: an array of another dtype.
    """
    n, L = len(records.doc), len(layers)
    for name, array, dtype, shape in (
        ("doc", records.doc, np.int64, (n,)),
        ("pos", records.pos, np.int32, (n,)),
        ("token", records.token, np.int32, (n,)),
        ("phase", records.phase, np.uint8, (n,)),
        ("ids", records.ids, id_dtype(num_experts), (L, n, top_k)),
        ("weights", records.weights if "weights" in record else None, np.float16, (L, n, top_k)),
        ("stats", records.stats if "stats" in record else None, np.float16, (L, n, len(STATISTICS))),
    ):
        if array is None:
            if name in record:
                raise ValueError(f"{name}: expected an array, since the run records {name}, got None.")
            continue
        if array.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {np.dtype(dtype)}, got {array.dtype}.")
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}.")
    if not n:
        return
    for name, array in (("doc", records.doc), ("pos", records.pos)):
        if array.min() < 0:
            raise ValueError(f"{name}: expected numbers >= 0, got {array.min()} at token {int(array.argmin())}.")
    if records.phase.max() >= len(PHASES):
        raise ValueError(f"phase: expected numbers < {len(PHASES)}, got {records.phase.max()}.")
    found = find_bad_row(records.ids, num_experts)
    if found is not None:
        layer, token = found
        row, why = records.ids[layer, token], "unused slots"
        if (row < num_experts).all():
            why = "an expert twice"
        elif (row[row >= num_experts] != unused(num_experts)).any():
            why = "no such expert"
        raise ValueError(
            f"ids: expected {top_k} different experts in [0, {num_experts}) for each token, got {row.tolist()} ({why})"
            f" in layer {layers[layer]}, token {token} (document {records.doc[token]}, position {records.pos[token]})."
        )


def check_counts(
    doc_ids: NDArray[np.int64],
    counts: NDArray[np.int32],
    n_tokens: NDArray[np.int64],
    layers: list[int],
    num_experts: int,
    top_k: int,
) -> None:
    """Check documents that come as counts alone.

    Raises:
        ValueError: arrays of other shapes, ids that do not ascend, picks that are not K for every token and layer.
        TypeError: an array of another dtype.
    """
    D = len(doc_ids)
    for name, array, dtype, shape in (
        ("doc_ids", doc_ids, np.int64, (D,)),
        ("counts", counts, np.int32, (D, len(layers), num_experts)),
        ("n_tokens", n_tokens, np.int64, (D,)),
    ):
        if array.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {np.dtype(dtype)}, got {array.dtype}.")
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}.")
        if array.size and array.min() < 0:
            raise ValueError(f"{name}: expected numbers >= 0, got {array.min()}.")
    if (np.diff(doc_ids) <= 0).any():
        raise ValueError("doc_ids: expected ids that ascend, each once, got another order.")
    picks = counts.sum(axis=2, dtype=np.int64)
    wrong = picks != n_tokens[:, None] * top_k
    if wrong.any():
        doc, layer = np.argwhere(wrong)[0]
        raise ValueError(
            f"counts: expected {n_tokens[doc] * top_k} picks in each layer ({n_tokens[doc]} tokens, top {top_k}), got"
            f" {picks[doc, layer]} in layer {layers[layer]} of document {doc_ids[doc]}."
        )


def find_bad_row(ids: NDArray[Any], num_experts: int) -> tuple[int, int] | None:
    """The first (layer, token) of ids [L, n, K] with an id that is no expert, or one that occurs twice."""
    if not ids.size:
        return None
    K = ids.shape[-1]
    flat = np.ascontiguousarray(ids).reshape(-1)
    block = max(1, _BLOCK // K) * K
    for start in range(0, flat.size, block):
        if _is_bad(flat[start : start + block], K, num_experts):
            rows = flat[start : start + block].reshape(-1, K)
            bad = (rows >= num_experts).any(axis=1) | (np.diff(np.sort(rows, axis=1), axis=1) == 0).any(axis=1)
            layer, token = divmod(start // K + int(bad.argmax()), ids.shape[1])
            return layer, token
    return None


def _is_bad(flat: NDArray[Any], K: int, num_experts: int) -> bool:
    """Whether a whole number of rows, end to end, has a bad one: every id against the one `step` further on."""
    if flat.max() >= num_experts:
        return True
    equal = np.empty(flat.size, bool)
    for step in range(1, K):
        within = equal[:-step]
        np.equal(flat[:-step], flat[step:], out=within)
        np.logical_and(within, _same_row(K, step, flat.size // K)[:-step], out=within)
        if np.count_nonzero(within):  # no wrapper in Python, unlike any()
            return True
    return False


@lru_cache(maxsize=256)
def _same_row(K: int, step: int, rows: int) -> NDArray[np.bool_]:
    """[rows * K] whether the id `step` further on belongs to the same token."""
    return np.tile(np.arange(K) < K - step, rows)


def is_sorted(doc: NDArray[np.int64], pos: NDArray[np.int32]) -> bool:
    """Whether rows ascend by (doc, pos), repeats allowed."""
    rises = doc[1:] > doc[:-1]
    return bool((rises | ((doc[1:] == doc[:-1]) & (pos[1:] >= pos[:-1]))).all())
