"""What records must be before they are kept, and whether those read back still are."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import PHASES, STATISTICS, Records, id_dtype, unrouted, unused

_BLOCK = 1 << 17  # ids compared at a time, so that they, their masks and the result stay in the cache


def check_records(
    records: Records,
    layers: list[int],
    num_experts: int,
    top_k: int,
    record: tuple[str, ...],
    by_layer: list[int] | None = None,
) -> None:
    """Check one batch of records.

    Args:
        by_layer: experts of each layer, where they are not `num_experts` in all.

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
    found = find_bad_row(records.ids, num_experts, by_layer)
    if found is not None:
        layer, token = found
        row, why = records.ids[layer, token], "unused slots"
        experts = num_experts if by_layer is None else by_layer[layer]
        if (row < experts).all():
            why = "an expert twice"
        elif (row == unrouted(num_experts)).any():
            why = f"{unrouted(num_experts)}, which says that the router gave NaN, beside other ids"
        elif (row[row >= experts] != unused(num_experts)).any():
            why = "no such expert"
        raise ValueError(
            f"ids: expected {top_k} different experts in [0, {experts}) for each token, got {row.tolist()} ({why})"
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
        ValueError: arrays of other shapes, ids that do not ascend, picks that are not K for every token and layer, or
            for fewer tokens: what is missing was not routed.
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
    wrong = is_no_count(picks, n_tokens, top_k)
    if wrong.any():
        doc, layer = np.argwhere(wrong)[0]
        raise ValueError(
            f"counts: expected {n_tokens[doc] * top_k} picks in each layer ({n_tokens[doc]} tokens, top {top_k}), got"
            f" {picks[doc, layer]} in layer {layers[layer]} of document {doc_ids[doc]}; only a token to which a router"
            " gave NaN has none."
        )


def is_no_count(picks: NDArray[np.int64], n_tokens: NDArray[np.int64], top_k: int) -> NDArray[np.bool_]:
    """[D, L] where `picks` cannot come from `n_tokens` [D] tokens, each of which picks K experts or, unrouted, none."""
    return (picks > n_tokens[:, None] * top_k) | (picks % top_k != 0)


def find_bad_row(ids: NDArray[Any], num_experts: int, by_layer: list[int] | None = None) -> tuple[int, int] | None:
    """The first (layer, token) of ids [L, n, K] with an id that is no expert, or one that occurs twice.

    A token that is `unrouted` in all its slots is no bad one.
    """
    if not ids.size:
        return None
    if by_layer is not None and min(by_layer) < num_experts:
        limits = np.array(by_layer)[:, None, None]
        strange = ((ids >= limits) & (ids < num_experts)).any(axis=2)
        if strange.any():
            layer, token = np.argwhere(strange)[0].tolist()
            return layer, token
    K = ids.shape[-1]
    flat = np.ascontiguousarray(ids).reshape(-1)
    block = max(1, _BLOCK // K) * K
    for start in range(0, flat.size, block):
        if _is_bad(flat[start : start + block], K, num_experts):
            rows = flat[start : start + block].reshape(-1, K)
            bad = (rows >= num_experts).any(axis=1) | (np.diff(np.sort(rows, axis=1), axis=1) == 0).any(axis=1)
            bad &= (rows != unrouted(num_experts)).any(axis=1)
            if not bad.any():
                continue
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
