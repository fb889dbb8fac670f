"""Routing given the token: what is left of a difference between groups once they have the same tokens."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .groups import RunLike, label_column, weights_of
from .tokens import Rows, chosen_layers, layer_groups, no_tokens, one_hot
from .weights import View

logger = logging.getLogger("omnigene_fast")

SMALLEST = 2  # documents of every group that have a token, of which one alone would be given twice


class GivenTokens(View):
    """A run whose groups have the same tokens in every measure of counts; see `given_tokens`."""

    def __init__(self, run: RunLike, by: str, counts: NDArray[np.float64], kept: float) -> None:
        super().__init__(run)
        self.counts, self.given, self.kept = counts, by, kept


def given_tokens(run: RunLike, by: str = "task", *, position: bool = False) -> GivenTokens:
    """The run for the measures of counts as it would be if all groups had the same tokens.

    Groups of documents differ in routing because they differ in what they say, or because the router sends the same
    token elsewhere. Direct standardisation tells the two apart: the shares of a group are sum_v w(v) p(e | v), over the
    token ids v that two or more documents of every group have, with weights w(v) that are the same for all groups, the
    mean of their shares of tokens. So `divergence(given_tokens(run))` beside `divergence(run)` says how much of a
    divergence stays given the token. What a document adds is how its picks depart from those of its group for the same
    tokens (the influence function of the standardised share), which gives intervals, floors and p-values.

    Args:
        run: an opened trace with ids and token ids.
        by: label that makes the groups, of the measures too.
        position: take tokens of one id and of one octave of positions (0, 1, 2-3, 4-7, ...) as the same, not of one id.

    Returns:
        what `divergence`, `divergence_summary`, `differentiation`, `load` and `specialty` take as a run, with `kept`,
        the share of the tokens that are compared.

    Raises:
        ValueError: no such label, no tokens or token ids, or no token that every group has.
    """
    if weights_of(run) != "tokens" or hasattr(run, "given"):
        raise ValueError(
            "run: expected a run as it was opened, got a view of it; given_tokens weighs documents itself."
        )
    chosen_layers(run, list(run.layers))  # all of them have experts for every token
    labels, rows = label_column(run, by), Rows.of(run)
    names = sorted({label for label in labels if label is not None})
    group = np.array([-1 if label is None else names.index(label) for label in labels])
    D, G, E = len(group), len(names), run.num_experts
    keys, counted = _occurrences(run, rows, group, position)  # [D, V]
    present = np.stack([_columns(counted[group == g] > 0) for g in range(G)])
    common = np.flatnonzero((present >= SMALLEST).all(0))
    if not len(common):
        raise ValueError(
            f"by: expected tokens that {SMALLEST} or more documents of every group have, got none for {by!r} in run"
            f" {run.name!r}; its groups have no tokens in common."
        )
    part = counted[:, common]
    own = np.stack([_columns(part[group == g]) for g in range(G)])  # [G, V] tokens
    kept = float(own.sum() / counted.sum())
    weight = (own / own.sum(1, keepdims=True)).mean(0)
    scale = weight * own.sum(1, keepdims=True) / own  # of a token of a group
    tokens = sparse.csr_array(part.multiply(scale[group]))  # [D, V] weighted
    total = tokens.sum(1)
    counts = np.zeros((D, len(run.layers), E))
    for some in layer_groups(range(len(run.layers)), 8 * E * (D + G * len(common))):
        layers = [int(run.layers[at]) for at in some]
        picked = np.zeros((len(some), G * len(common), E))  # by group and token
        for batch in run.batches(layers=layers, kinds=("ids",)):
            row, key, known = _keys(batch, rows, group, position)
            at = np.minimum(np.searchsorted(keys[common], key), len(common) - 1)
            known, row, at = (one[keys[common][at] == key] for one in (known, row, at))
            cell, more = group[row] * len(common) + at, scale[group[row], at]
            for place, layer in enumerate(some):
                hot = sparse.csr_array(one_hot(batch.ids[place][known], E).astype(np.float64))
                picked[place] += _sums(cell, hot, G * len(common))
                counts[:, layer] += _sums(row, hot, D, more)
        for place, layer in enumerate(some):
            chance = picked[place].reshape(G, len(common), E) / np.maximum(own[..., None], 1)
            for g in range(G):
                mine = group == g
                standard = weight @ chance[g]
                counts[mine, layer] += np.outer(total[mine], standard) - tokens[mine] @ chance[g]
    logger.info("given_tokens: %.1f %% of the tokens of run %r are such as every group has.", 100 * kept, run.name)
    return GivenTokens(run, by, counts, kept)


def _keys(batch: Any, rows: Rows, group: NDArray[Any], position: bool) -> tuple[NDArray[Any], ...]:
    """Rows of documents, keys and places of the tokens with an id whose document is in a group."""
    row = rows(batch.doc)
    known = np.flatnonzero((batch.token >= 0) & (group[row] >= 0))
    key = batch.token[known].astype(np.int64)
    if position:
        key = key * 64 + np.log2(batch.pos[known] + 1).astype(np.int64)
    return row[known], key, known


def _occurrences(run: RunLike, rows: Rows, group: NDArray[Any], position: bool) -> tuple[NDArray[Any], Any]:
    """[V] keys in order, and how often each document has each of them [D, V]."""
    found = []
    for batch in run.batches(layers=list(run.layers[:1]), kinds=("ids",)):
        row, key, _ = _keys(batch, rows, group, position)
        pairs, count = np.unique(np.stack([row, key]), axis=1, return_counts=True)
        found.append((*pairs, count))
    if not sum(len(count) for *_, count in found):
        raise no_tokens(run)
    row, key, count = (np.concatenate(each) for each in zip(*found, strict=True))
    keys, at = np.unique(key, return_inverse=True)
    shape = (len(group), len(keys))
    return keys, sparse.csr_array(sparse.coo_array((count.astype(np.float64), (row, at)), shape))


def _columns(counts: Any) -> NDArray[np.float64]:
    return np.asarray(counts.sum(0), np.float64)


def _sums(place: NDArray[Any], hot: Any, size: int, weight: Any = None) -> NDArray[np.float64]:
    """[size, E] sums of the rows of `hot` by their place."""
    n = len(place)
    chosen = sparse.csr_array((np.ones(n) if weight is None else weight, (place, np.arange(n))), (size, n))
    return np.asarray((chosen @ hot).todense())
