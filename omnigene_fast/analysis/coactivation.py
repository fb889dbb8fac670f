"""Which experts are picked together: by one token in one layer, and from one layer to the next."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .groups import RunLike
from .resampling import Jackknife
from .tokens import BLOCKS, Rows, chosen_layers, layer_groups, no_tokens, one_hot

if TYPE_CHECKING:
    import pandas


def coactivation_counts(run: RunLike, layers: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Tokens that picked both experts, over all K (K - 1) / 2 pairs of a token.

    Args:
        run: an opened trace with ids.
        layers: decoder indices; all if None.

    Returns:
        [layers, E, E] int64, symmetric; on the diagonal the tokens that picked the expert.
    """
    kept = chosen_layers(run, layers)
    found = [blocks.sum(0) for _, blocks, _ in _products(run, [(layer, layer) for layer in kept], 1)]
    return np.stack(found).astype(np.int64)


def flow_counts(run: RunLike, layers: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Tokens that picked expert e in a layer and e' in the next recorded one: [layers - 1, E, E] int64."""
    kept = chosen_layers(run, layers)
    found = [blocks.sum(0) for _, blocks, _ in _products(run, list(pairwise(kept)), 1)]
    return np.stack(found).astype(np.int64) if found else np.zeros((0, run.num_experts, run.num_experts), np.int64)


def coactivation(
    run: RunLike, *, layers: Sequence[int] | None = None, top: int | None = 50, blocks: int = BLOCKS
) -> "pandas.DataFrame":
    """Expert co-activation (OLMoE, arXiv 2409.02060, section 5.2): N(a, b) / N(a), the share of an expert's tokens that
    also picked another, over every pair of a token's picks.

    Args:
        run: an opened trace with ids.
        layers: decoder indices; all if None.
        top: pairs per layer, those most tokens above expectation first; None: every pair.
        blocks: of documents for the interval, which leaves out one block at a time; fewer if there are fewer documents.

    Returns:
        a row per layer and pair a < b: layer, a, b, tokens (that picked both), coactivation_ab (of a's tokens),
        coactivation_ba (of b's), lift (N(a,b) N / (N(a) N(b))), lift_low, lift_high (jackknife over blocks of
        documents, 95 %), lift_uniform (what lift is under even, independent routing: (K - 1) E / (K (E - 1)), below 1
        as the picks of a token are distinct), docs, unit.

    Raises:
        ValueError: a layer that was not recorded, or no tokens.
    """
    import pandas as pd

    kept, E, K = chosen_layers(run, layers), run.num_experts, run.top_k
    uniform = (K - 1) * E / (K * (E - 1)) if E > 1 else float("nan")
    first, second = np.triu_indices(E, 1)
    frames = []
    for (layer, _), counts, tokens in _products(run, [(layer, layer) for layer in kept], blocks):
        single = np.einsum("bee->be", counts)
        both = counts[:, first, second]
        total, a, b = both.sum(0), single.sum(0)[first], single.sum(0)[second]
        n = tokens.sum()
        chosen = _largest(total - a * b / n * uniform, top)
        a, b, total = a[chosen], b[chosen], total[chosen]
        lift = _jackknifed_lift(both[:, chosen], single[:, first[chosen]], single[:, second[chosen]], tokens)
        with np.errstate(invalid="ignore", divide="ignore"):
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "a": first[chosen],
                        "b": second[chosen],
                        "tokens": total.astype(np.int64),
                        "coactivation_ab": total / a,
                        "coactivation_ba": total / b,
                        "lift": lift.value,
                        "lift_low": lift.low,
                        "lift_high": lift.high,
                        "lift_uniform": uniform,
                        "docs": len(run.documents),
                        "unit": "share of tokens",
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def flow(
    run: RunLike, *, layers: Sequence[int] | None = None, top: int | None = 50, blocks: int = BLOCKS
) -> "pandas.DataFrame":
    """From layer to layer: how often the tokens of an expert pick each expert of the next recorded layer.

    Args: as `coactivation`; top: edges per pair of layers.

    Returns:
        a row per edge: layer, next_layer (decoder indices), expert, next_expert, tokens, probability (of the expert's
        tokens, the share that picks next_expert; over next_expert they sum to K), expected (the share of all tokens
        that does: independence), lift (their ratio), lift_low, lift_high (jackknife over blocks of documents, 95 %),
        docs, unit.

    Raises:
        ValueError: a layer that was not recorded, fewer than two layers, or no tokens.
    """
    import pandas as pd

    kept, E = chosen_layers(run, layers), run.num_experts
    if len(kept) < 2:
        raise ValueError(f"layers: expected at least two recorded layers, got {kept}.")
    frames = []
    for (layer, following), counts, tokens in _products(run, list(pairwise(kept)), blocks):
        K = run.top_k
        source, target = counts.sum(2) / K, counts.sum(1) / K  # [B, E] tokens of each expert, before and after
        both = counts.reshape(len(counts), -1)
        chosen = _largest((counts.sum(0) - np.outer(source.sum(0), target.sum(0)) / tokens.sum()).ravel(), top)
        a, b = np.divmod(chosen, E)
        lift = _jackknifed_lift(both[:, chosen], source[:, a], target[:, b], tokens)
        total = both[:, chosen].sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "next_layer": following,
                        "expert": a,
                        "next_expert": b,
                        "tokens": total.astype(np.int64),
                        "probability": total / source.sum(0)[a],
                        "expected": target.sum(0)[b] / tokens.sum(),
                        "lift": lift.value,
                        "lift_low": lift.low,
                        "lift_high": lift.high,
                        "docs": len(run.documents),
                        "unit": "share of tokens",
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def _products(
    run: RunLike, pairs: list[tuple[int, int]], blocks: int
) -> Iterator[tuple[tuple[int, int], NDArray[np.float64], NDArray[np.float64]]]:
    """Per pair of layers, by block: tokens [B, E, E] that picked e in the first and e' in the second; tokens [B]."""
    rows, E = Rows.of(run), run.num_experts
    B = max(1, min(blocks, len(run.documents)))
    tokens_of = np.asarray(run.documents["n_tokens"], np.int64)
    if not tokens_of.sum():
        raise no_tokens(run)
    tokens = np.bincount(np.arange(len(tokens_of)) % B, weights=tokens_of, minlength=B).astype(np.float64)
    at = {pair: position for position, pair in enumerate(pairs)}
    for some in layer_groups(range(len(pairs)), 8 * B * E * E):
        wanted = [pairs[position] for position in some]
        needed = [layer for layer in run.layers if any(layer in pair for pair in wanted)]
        sums = np.zeros((len(wanted), B, E, E))
        for part in run.batches(layers=needed, kinds=("ids",)):
            block = rows(part.doc) % B
            for b in np.unique(block):
                _add(sums[:, b], part.ids[:, block == b], wanted, needed, E)
        for pair in wanted:
            yield pair, sums[at[pair] - some[0]], tokens


def _add(
    sums: NDArray[np.float64], ids: NDArray[Any], wanted: list[tuple[int, int]], layers: list[int], E: int
) -> None:
    for start in range(0, ids.shape[1], 16384):  # float32 sums of so few ones are exact
        hot: dict[int, torch.Tensor] = {}
        for at, layer in enumerate(layers):
            hot[layer] = torch.from_numpy(one_hot(ids[at, start : start + 16384], E))
            for position, (first, second) in enumerate(wanted):
                if second == layer:
                    sums[position] += (hot[first].T @ hot[second]).numpy()
            for old in [key for key in hot if key not in layers[max(0, at - 1) : at + 1]]:
                del hot[old]


def _jackknifed_lift(both: Any, first: Any, second: Any, tokens: Any) -> Jackknife:
    """Lift of cells [B, n] by block; the interval leaves out one block at a time."""

    def lift(pair: Any, a: Any, b: Any, n: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            return pair * n / (a * b)

    pair, a, b, n = (part.sum(0) for part in (both, first, second, tokens))
    estimate = Jackknife(lift(pair, a, b, n))
    return estimate.stratum(np.asarray(lift(pair - both, a - first, b - second, (n - tokens)[:, None])))


def _largest(excess: NDArray[np.float64], top: int | None) -> NDArray[np.int64]:
    order = np.argsort(-excess, kind="stable")
    return order if top is None else order[:top]
