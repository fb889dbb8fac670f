"""Which experts are picked together: by one token in one layer, and from one layer to the next."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .groups import RunLike
from .resampling import Jackknife, benjamini_hochberg, quantile
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
        top: pairs per layer, those most tokens above expectation first; None: every pair. The largest of many are large
            by chance too: one half of the documents chooses, and lift and its interval are those of the other half.
        blocks: of documents for the interval, which leaves out one block at a time; fewer if there are fewer documents.

    Returns:
        a row per layer and pair a < b: layer, a, b, tokens (that picked both), coactivation_ab (of a's tokens),
        coactivation_ba (of b's), lift (N(a,b) N / (N(a) N(b))), lift_low, lift_high (of its logarithm, jackknife over
        blocks of documents, 95 %; NaN if fewer than four documents choose and estimate), lift_choice (lift in the half
        that chose the pair: too large), lift_uniform (what lift is under even, independent routing: (K - 1) E / (K (E -
        1)), below 1 as the picks of a token are distinct), docs, unit.

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
        choice, _ = _halves(len(counts), top)
        a_choice, b_choice = single[choice].sum(0)[first], single[choice].sum(0)[second]
        excess = both[choice].sum(0) - a_choice * b_choice / tokens[choice].sum() * uniform
        chosen = _largest(excess, top)
        a, b, total = a[chosen], b[chosen], total[chosen]
        lift = _lifts(both[:, chosen], single[:, first[chosen]], single[:, second[chosen]], tokens, top)
        del lift["p_value"]  # picks of one token are distinct, and a lift of 1 is not what chance gives
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
                        **lift,
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

    Args: as `coactivation`; top: edges per pair of layers. In 200 simulated worlds each, with layers that choose
        independently or not, intervals of chosen edges and pairs held the truth in 95 to 96 %, and of independent
        layers 0.2 % of the edges had a q_value below 0.05.

    Returns:
        a row per edge: layer, next_layer (decoder indices), expert, next_expert, tokens, probability (of the expert's
        tokens, the share that picks next_expert; over next_expert they sum to K), expected (the share of all tokens
        that does: independence), lift, lift_low, lift_high, lift_choice (of their ratio, as `coactivation`), p_value
        (of a lift of at most 1, where one half of the documents chose the edge), q_value (Benjamini-Hochberg over the
        rows), docs, unit.

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
        choice, _ = _halves(len(counts), top)
        expected = np.outer(source[choice].sum(0), target[choice].sum(0)) / tokens[choice].sum()
        chosen = _largest((counts[choice].sum(0) - expected).ravel(), top)
        a, b = np.divmod(chosen, E)
        lift = _lifts(both[:, chosen], source[:, a], target[:, b], tokens, top)
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
                        **lift,
                        "docs": len(run.documents),
                        "unit": "share of tokens",
                    }
                )
            )
    table = pd.concat(frames, ignore_index=True)
    return table.assign(q_value=benjamini_hochberg(table["p_value"]))


def _products(
    run: RunLike, pairs: list[tuple[int, int]], blocks: int
) -> Iterator[tuple[tuple[int, int], NDArray[np.float64], NDArray[np.float64]]]:
    """Per pair of layers, by block: tokens [B, E, E] that picked e in the first and e' in the second; tokens [B]."""
    rows, E = Rows.of(run), run.num_experts
    B = max(1, min(2 * blocks, len(run.documents)))
    tokens_of = np.asarray(run.documents["n_tokens"], np.int64)
    if not tokens_of.sum():
        raise no_tokens(run)
    block_of = _originals(run) % B
    tokens = np.bincount(block_of, weights=tokens_of, minlength=B).astype(np.float64)
    at = {pair: position for position, pair in enumerate(pairs)}
    for some in layer_groups(range(len(pairs)), 8 * B * E * E):
        wanted = [pairs[position] for position in some]
        needed = [layer for layer in run.layers if any(layer in pair for pair in wanted)]
        sums = np.zeros((len(wanted), B, E, E))
        for part in run.batches(layers=needed, kinds=("ids",)):
            block = block_of[rows(part.doc)]
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


def _originals(run: RunLike) -> NDArray[np.int64]:
    """[D] row of the first document with the same text: copies of a text belong in one block."""
    hashes, first = run.documents.get("text_hash"), dict[str, int]()
    out = np.arange(len(run.documents))
    for row, text in enumerate(() if hashes is None else hashes):
        if isinstance(text, str):
            out[row] = first.setdefault(text, row)
    return out


def _halves(blocks: int, top: int | None) -> tuple[slice, slice]:
    """Blocks that choose the largest cells, and those that estimate them; all where nothing is chosen or too few."""
    return (slice(None), slice(None)) if top is None or blocks < 4 else (slice(0, None, 2), slice(1, None, 2))


def _lifts(both: Any, first: Any, second: Any, tokens: Any, top: int | None) -> dict[str, Any]:
    """Columns of the lifts of cells [B, n] by block, estimated from the blocks that chose none of them.

    The interval leaves out one block at a time, on the logarithm, of half a token more. A count of tokens varies at
    least about half as much as a Poisson variable: where few were seen, some of many cells vary little by chance.
    """
    from scipy import stats

    def lift(pair: Any, a: Any, b: Any, n: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            return pair * n / (a * b)

    choice, rest = _halves(len(tokens), top)
    sums = [part[rest].sum(0) for part in (both, first, second, tokens)]
    pair, a, b, n = sums
    centre = np.log(lift(pair + 0.5, a, b, n))
    left = lift(pair - both[rest] + 0.5, a - first[rest], b - second[rest], (n - tokens[rest])[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = Jackknife(centre).stratum(np.asarray(np.log(left)), tokens[rest])
    error = np.sqrt(np.maximum(estimate.variance, 0.5 / (pair + 0.5)))
    freedom = np.where(np.isfinite(estimate.freedom), estimate.freedom, len(left) - 1)
    if top is not None and choice == rest:  # too few documents to choose by some and ask others
        error = np.full_like(error, np.nan)
    margin = quantile(freedom) * error
    return {
        "lift": lift(*sums),
        "lift_low": np.exp(centre - margin),
        "lift_high": np.exp(centre + margin),
        "lift_choice": lift(*(part[choice].sum(0) for part in (both, first, second, tokens))),
        "p_value": stats.t.sf(centre / error, freedom),
    }


def _largest(excess: NDArray[np.float64], top: int | None) -> NDArray[np.int64]:
    order = np.argsort(-excess, kind="stable")
    return order if top is None else order[:top]
