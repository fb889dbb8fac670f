"""Whether an expert is picked by the token id alone."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .groups import RunLike
from .resampling import Jackknife
from .tokens import Rows, chosen_layers, no_tokens

if TYPE_CHECKING:
    import pandas


def vocabulary(
    run: RunLike, *, k: int = 1, min_count: int = 10, layers: Sequence[int] | None = None
) -> "pandas.DataFrame":
    """Vocabulary specialisation (OLMoE, arXiv 2409.02060, section 5.4): of a token id's occurrences, the share
    that goes to one expert, for the expert that gets most.

    Args:
        run: an opened trace with ids and token ids.
        k: how many of a token's picks count, in the router's order.
        min_count: occurrences that a token id needs: of one that occurs once the share is always 1.
        layers: decoder indices; all if None.

    Returns:
        a row per layer and token id: layer, token_id, expert, specialisation (share of the occurrences), expert_share
        (of all tokens, that goes to this expert: chance), lift (their ratio), count, docs (documents with the token
        id), unit.

    Raises:
        ValueError: a k or layer that does not fit, or no tokens with ids.
    """
    import pandas as pd

    frames = []
    for layer, cells, n in _cells(run, k, layers):
        token, expert, count = _summed(cells.token, cells.expert, cells.count)
        total = np.bincount(token, weights=count) / k
        best = np.lexsort((expert, -count, token))
        best = best[np.flatnonzero(np.diff(token[best], prepend=-1))]
        best = best[total[token[best]] >= min_count]
        load = np.bincount(cells.expert, weights=cells.count, minlength=run.num_experts) / n
        pairs = np.unique(cells.token * len(run.documents) + cells.doc)
        documents = np.bincount(pairs // len(run.documents))
        share = count[best] / total[token[best]]
        frames.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "token_id": token[best],
                    "expert": expert[best],
                    "specialisation": share,
                    "expert_share": load[expert[best]],
                    "lift": share / load[expert[best]],
                    "count": total[token[best]].round().astype(np.int64),
                    "docs": documents[token[best]],
                    "unit": "share of occurrences",
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def vocabulary_summary(
    run: RunLike, *, k: int = 1, min_count: int = 10, layers: Sequence[int] | None = None
) -> "pandas.DataFrame":
    """Vocabulary specialisation of each layer.

    The mean over token ids of the largest share grows as occurrences get fewer. `agreement` does not: it is the share
    of pairs of occurrences of one token id in different documents that go to the same expert, a ratio of two sums over
    all such pairs and so unbiased only in the limit of many documents. Pairs have equal weight, so that frequent token
    ids dominate it.

    Args: as `vocabulary`.

    Returns:
        a row per layer: layer, specialisation (mean of `vocabulary`'s over token ids with `min_count` occurrences; not
        comparable with the number that OLMoE publishes, whose script, run_moe_analysis.py, takes it over all token ids,
        as min_count=1 does, and needs 10 occurrences only for its lists), agreement, low, high (jackknife over
        documents, 95 %), chance (the same share among any two tokens of different documents), types (token ids with
        `min_count` occurrences), tokens, docs, unit. With k > 1, agreement and chance are those of one of the k picks,
        chosen at random. NaN: agreement and its interval where no token id occurs in two documents, chance too in a run
        of one document.

    Raises:
        ValueError: as `vocabulary`.
    """
    import pandas as pd

    rows = []
    for layer, cells, n in _cells(run, k, layers):
        D = len(run.documents)
        token, _, count = _summed(cells.token, cells.expert, cells.count)
        total = np.bincount(token, weights=count) / k
        largest = np.zeros(len(total))
        np.maximum.at(largest, token, count)
        often = total >= min_count
        same = _between(cells.token * run.num_experts + cells.expert, cells.doc, cells.count, D)
        pairs = _between(cells.token, cells.doc, cells.count, D)
        alike = _between(cells.expert, cells.doc, cells.count, D)[0]
        any_two = _between(cells.expert * 0, cells.doc, cells.count, D)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            estimate = Jackknife(same[0] / pairs[0])
            estimate.stratum(
                ((same[0] - same[1]) / (pairs[0] - pairs[1]))[np.unique(cells.doc)],
                np.bincount(cells.doc, weights=cells.count)[np.unique(cells.doc)],
            )
            chance = alike / any_two
        rows.append(
            {
                "layer": layer,
                "specialisation": (largest[often] / total[often]).mean() if often.any() else float("nan"),
                "agreement": float(estimate.value),
                "low": float(estimate.low),
                "high": float(estimate.high),
                "chance": float(chance),
                "types": int(often.sum()),
                "tokens": n,
                "docs": len(np.unique(cells.doc)),
                "unit": "share of occurrences",
            }
        )
    return pd.DataFrame(rows)


class _Cells:
    """Picks per document, token id and expert, as columns."""

    def __init__(self, doc: Any, token: Any, expert: Any, count: Any) -> None:
        self.doc, self.token, self.expert, self.count = doc, token, expert, count


def _cells(run: RunLike, k: int, layers: Sequence[int] | None) -> Iterator[tuple[int, _Cells, int]]:
    """Per layer its cells and the number of its tokens."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= run.top_k:
        raise ValueError(f"k: expected an integer in [1, {run.top_k}], got {k!r}.")
    rows, E, D = Rows.of(run), run.num_experts, len(run.documents)
    for layer in chosen_layers(run, layers):
        keys, counts, n = [], [], 0
        for part in run.batches(layers=[layer], kinds=("ids",)):
            known = part.token >= 0
            n += int(known.sum())
            place = rows(part.doc[known]) * E + part.token[known].astype(np.int64) * (E * D)
            key, count = np.unique((place[:, None] + part.ids[0][known, :k]).ravel(), return_counts=True)
            keys.append(key)
            counts.append(count)
        if not n:
            raise no_tokens(run)
        key, total = _merged(np.concatenate(keys), np.concatenate(counts))
        yield layer, _Cells(key // E % D, key // (E * D), key % E, total), n


def _merged(key: NDArray[np.int64], count: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    unique, at = np.unique(key, return_inverse=True)
    return unique, np.bincount(at, weights=count).astype(np.float64)


def _summed(token: Any, expert: Any, count: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Picks per token id and expert, over documents."""
    E = int(expert.max()) + 1
    key, total = _merged(token * E + expert, count)
    return key // E, key % E, total


def _between(
    key: NDArray[np.int64], doc: NDArray[np.int64], count: Any, documents: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ordered pairs of picks with one key in two documents: their number, and [D] those that fall away with each."""
    _, at = np.unique(key, return_inverse=True)
    cell, mine = _merged(at * documents + doc, count)
    at, doc = cell // documents, cell % documents
    total = np.bincount(at, weights=mine)[at]
    crossing = mine * (total - mine)
    return np.asarray(crossing.sum(), np.float64), np.bincount(doc, weights=2 * crossing, minlength=documents).astype(
        np.float64
    )
