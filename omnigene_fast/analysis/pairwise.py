"""Divergence of single documents, pair by pair: do two prompts take different experts?"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..tracing.counting import count_picks
from .divergence import with_mean
from .groups import RunLike, check_permutations, check_unit, chunk_rows, label_column
from .null import entropy
from .resampling import Jackknife, p_value
from .tokens import Rows, chosen_layers, layer_groups

if TYPE_CHECKING:
    import pandas

_DRAWS = 2000  # of the noise floor, over all pairs
_SHIFTS = 8  # other pairs that a pair's document meets, where there are counts alone


def pairwise(
    run: RunLike,
    by_pair: str = "pair",
    by: str | None = "task",
    *,
    permutations: int = 1000,
    cross: int = 2000,
    seed: int = 0,
    base: str = "nats",
    average: bool = False,
) -> "pandas.DataFrame":
    """Divergence of the two documents of each pair, beside that of single documents of different groups.

    The OmniGene-4 paper asks with it whether pairs that the model answers differently also take different experts. A
    document is a small sample, so that two of the very same distribution diverge as well: `floor` is the mean
    divergence if they are two stretches of one stream, by dealing out blocks of both (`_stretches`): tokens that hang
    together vary more than exchangeable ones. A drift within documents counts as noise.

    A run of counts alone does not say how tokens hang together. There `floor` is that of tokens dealt out one by one
    (hypergeometric), which is too low, and `corrected` too high, if they do; and `low` is the lower end of js less the
    mean js of two documents of one group that are no pair, which is at least the floor: above 0 it says that pairs
    differ more than any two documents do.

    In 200 simulated worlds each of 40 pairs (200, 50 and 800, or 20 to 2,000 tokens; each token the one before with
    probability 0, 0.5 or 0.9) the interval held the truth in 92 to 100 %, and that of counts alone in 93 to 100 %
    (`python -m omnigene_fast.bench.simulations --only pairwise`).

    Args:
        run: an opened trace.
        by_pair: label with the pair's id; each value stands on exactly two documents, others are left out.
        by: label of the groups, or None: no "cross" rows, and pairs are re-formed among all documents.
        permutations: re-pairings of the pairs' documents within their group; 0: NaN in repaired and p_value.
        cross: at most so many pairs of documents of different groups, drawn at random from all documents with labels.
        seed: of all draws.
        base: "nats" or "bits".
        average: add the rows of "mean", the mean over the layers; a document falls away from, and is re-paired in, all
            layers at once.

    Returns:
        a row per layer and kind: layer (decoder index, "mean"), kind ("pair", "cross"), js (mean over pairs), floor,
        corrected (js - floor), low, high (of corrected; "pair": over pairs, "cross": jackknife over documents, 95 %,
        and at the lower end as much again as the floor was carried on from blocks to documents; low is NaN of counts
        alone where no group has two pairs), floor_of ("stretches", or "tokens" of counts alone),
        repaired (mean js of random pairs of the same group), p_value (of re-pairing, two-sided; NaN for "cross"),
        pairs, docs, tokens (median of a document), unit.

    Raises:
        ValueError: no such label, a pair without exactly two documents, or no pair.
    """
    import pandas as pd

    chosen_layers(run, list(run.layers))  # all of them have experts for every token
    unit = check_unit(base)
    check_permutations(permutations)
    first, second, stratum = _pairs(run, by_pair, by)
    draw = np.random.default_rng(seed)
    alone = "ids" not in getattr(run, "record", ())
    floors = _single_tokens if alone else _stretches
    units = np.arange(len(first))
    pairs = _Pairs("pair", first, second, units, units, stratum, _values(run, first, second))
    null = _repaired(run, pairs, permutations, draw) if permutations else None
    tables = [_table(run, pairs, floors(run, first, second, draw), alone, null, unit)]
    if by is not None:
        labels = label_column(run, by)
        a, b = _crossing(labels, run.counts.any(axis=(1, 2)), cross, draw)
        if len(a):
            ends = [(labels[x], labels[y]) for x, y in zip(a, b, strict=True)]
            pairs = _Pairs("cross", a, b, a, b, ends, _values(run, a, b))
            tables.append(_table(run, pairs, floors(run, a, b, draw), alone, None, unit))
    table = pd.concat(tables).assign(unit=base)
    table = table.sort_values(["place", "kind"], ascending=[True, False], ignore_index=True).drop(columns="place")
    return table if average else table[table["layer"] != "mean"].reset_index(drop=True).astype({"layer": int})


@dataclass
class _Pairs:
    """Pairs of documents of one kind: rows of both, units that a pair falls away with, labels of both, divergence."""

    kind: str
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    unit_first: NDArray[np.int64]
    unit_second: NDArray[np.int64]
    stratum: list[Any]
    value: NDArray[np.float64]  # [P, L]

    @property
    def members(self) -> NDArray[np.int64]:
        """[P, 2] units."""
        return np.stack([self.unit_first, self.unit_second], 1)


def _table(
    run: RunLike,
    pairs: _Pairs,
    floors: tuple[NDArray[np.float64], NDArray[np.float64]],
    counts_alone: bool,
    null: NDArray[np.float64] | None,
    unit: float,
) -> "pandas.DataFrame":
    """Rows of one kind, the mean over layers last."""
    import pandas as pd

    value, floor, step = (with_mean(each) for each in (pairs.value, *floors))
    null = None if null is None else with_mean(null)
    excess, units = value - floor, np.unique(pairs.members)
    estimate = Jackknife(excess.mean(0)).stratum(_deleted(excess, pairs.members, units))
    low = excess.mean(0) - estimate.margin - np.maximum(step.mean(0), 0)
    if counts_alone:
        low = np.minimum(low, _beyond_others(run, pairs, value, units))
    nothing = np.full(value.shape[1], np.nan)
    tail = nothing
    if null is not None:
        tail = np.minimum(1, 2 * np.minimum(p_value(null, value.mean(0)), p_value(-null, -value.mean(0))))
    docs = np.unique([pairs.first, pairs.second])
    return pd.DataFrame(
        {
            "place": [*(int(layer) for layer in run.layers), np.inf],
            "layer": [*(int(layer) for layer in run.layers), "mean"],
            "kind": pairs.kind,
            "js": value.mean(0) * unit,
            "floor": floor.mean(0) * unit,
            "corrected": excess.mean(0) * unit,
            "low": low * unit,
            "high": (excess.mean(0) + estimate.margin) * unit,
            "floor_of": "tokens" if counts_alone else "stretches",
            "repaired": nothing if null is None else null.mean(0) * unit,
            "p_value": tail,
            "pairs": len(value),
            "docs": len(docs),
            "tokens": int(np.median(np.asarray(run.documents["n_tokens"])[docs])),
        }
    )


def _beyond_others(run: RunLike, pairs: _Pairs, value: NDArray[np.float64], units: Any) -> NDArray[np.float64]:
    """[L + 1] lower end of the mean js of pairs less that of two documents of one group that are no pair."""
    where: dict[Any, list[int]] = {}  # label -> positions in `sides`
    sides = [(pairs.first, pairs.unit_first), (pairs.second, pairs.unit_second)]
    if pairs.kind == "pair":  # a first document meets second ones, as in re-pairing
        for at, label in enumerate(pairs.stratum):
            where.setdefault(label, []).append(at)
    else:
        labels = dict(zip(pairs.first.tolist(), (one[0] for one in pairs.stratum), strict=True))
        labels |= dict(zip(pairs.second.tolist(), (one[1] for one in pairs.stratum), strict=True))
        for row, label in sorted(labels.items()):
            where.setdefault(label, []).append(row)
        sides = [(np.arange(len(run.counts)),) * 2] * 2
    ends = Counter(label for one in pairs.stratum for label in ([one] * 2 if pairs.kind == "pair" else one))
    found = []
    for label, positions in where.items():
        own = np.array(positions)
        for shift in range(1, min(_SHIFTS + 1, len(own))):
            other = np.roll(own, shift)
            weight = np.full(len(own), ends[label] / len(own) / min(_SHIFTS, len(own) - 1))
            found.append((own, other, weight))
    if not found:
        return np.full(value.shape[1], np.nan)
    own, other, weight = (np.concatenate(each) for each in zip(*found, strict=True))
    others = with_mean(_values(run, sides[0][0][own], sides[1][0][other]))
    members = np.stack([sides[0][1][own], sides[1][1][other]], 1)
    difference = value.mean(0) - np.average(others, 0, weight)
    left = _deleted(value, pairs.members, units) - _deleted(others, members, units, weight)
    estimate = Jackknife(difference).stratum(left)
    return np.asarray(difference - estimate.margin)


def _deleted(
    values: NDArray[np.float64], members: NDArray[np.int64], units: NDArray[np.int64], weight: Any = None
) -> NDArray[np.float64]:
    """[units, L] means of the pairs that remain when every pair with one unit falls away."""
    weight = np.ones(len(values)) if weight is None else weight
    at = np.searchsorted(units, members)
    gone, number = np.zeros((len(units), values.shape[1])), np.zeros(len(units))
    weighted = values * weight[:, None]
    for column in range(2 if np.any(at[:, 0] != at[:, 1]) else 1):
        np.add.at(gone, at[:, column], weighted)
        np.add.at(number, at[:, column], weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weighted.sum(0) - gone) / (weight.sum() - number)[:, None])


def _pairs(run: RunLike, by_pair: str, by: str | None) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Any]]:
    """Rows of the first and second document of each pair, and the group in which they may be re-paired."""
    ids, filled = label_column(run, by_pair), np.asarray(run.counts.any(axis=(1, 2)))
    labels = label_column(run, by) if by is not None else ["all"] * len(ids)
    where: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if name is not None:
            where.setdefault(name, []).append(row)
    wrong = [name for name, rows in where.items() if len(rows) != 2]
    if wrong:
        raise ValueError(
            f"by_pair: expected exactly two documents with each value of {by_pair!r}, got {len(where[wrong[0]])} with"
            f" {wrong[0]!r}."
        )
    kept = [rows for rows in where.values() if filled[rows].all()]
    if not kept:
        raise ValueError(f"by_pair: expected a pair of documents with tokens under {by_pair!r}, got none.")
    array = np.array(kept, np.int64)
    return array[:, 0], array[:, 1], [(labels[a], labels[b]) for a, b in kept]


def _crossing(labels: list[str | None], filled: Any, most: int, draw: np.random.Generator) -> Any:
    """Rows of pairs of documents of different groups, no pair twice."""
    rows = np.array([row for row, label in enumerate(labels) if label is not None and filled[row]], np.int64)
    code = np.unique([str(labels[row]) for row in rows], return_inverse=True)[1] if len(rows) else rows
    if len(rows) <= 2000:
        a, b = np.triu_indices(len(rows), 1)
        a, b = (part[code[a] != code[b]] for part in (a, b))
        chosen = draw.permutation(len(a))[:most]
        return rows[a[chosen]], rows[b[chosen]]
    a, b = np.sort(draw.integers(0, len(rows), (2, 4 * most)), axis=0)
    key = np.unique((a * len(rows) + b)[code[a] != code[b]])
    key = draw.permutation(key)[:most]
    return rows[key // len(rows)], rows[key % len(rows)]


def _share(counts: NDArray[Any]) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(counts, np.float64))
    return values / values.sum(-1, keepdim=True)


def _js(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray((entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2).clamp_min_(0).numpy())


def _values(run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """[P, L] divergence of the documents in rows a and b."""
    return np.concatenate([_js(_share(run.counts[a[s]]), _share(run.counts[b[s]])) for s in _slices(run, len(a))])


def _single_tokens(
    run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64], draw: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P, L] mean divergence when the tokens that picked an expert are dealt out to the two documents at random; 0.

    Experts are dealt out on their own, so that the picks of a draw need not add up to K a token. Divided by that sum
    they would vary less than shares do; divided by K times the tokens each expert varies as under a permutation of
    tokens, and the mean of the divergence, a sum over experts, is exact.
    """
    draws, out = max(1, _DRAWS // len(a)), []
    for some in _slices(run, len(a), draws):
        x, y = run.counts[a[some]].astype(np.int64), run.counts[b[some]].astype(np.int64)
        tokens = [counts.sum(-1, keepdims=True) // run.top_k for counts in (x, y)]
        both, size = x + y, (draws, *x.shape)
        left = draw.hypergeometric(both, np.maximum(tokens[0] + tokens[1] - both, 0), tokens[0], size)
        samples = zip((left, both - left), tokens, strict=True)
        p, q = (torch.from_numpy(sample / np.maximum(run.top_k * count, 1)) for sample, count in samples)
        out.append(_js(p, q).mean(0))
    floor = np.concatenate(out)
    return floor, np.zeros_like(floor)


def _stretches(
    run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64], draw: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P, L] mean divergence of two stretches of one stream with the lengths of the documents in rows a and b.

    Both are cut into blocks as long as a part of the shorter document, and the blocks are dealt out anew, each document
    keeping its length and giving its share of the blocks. What hangs together within a block stays together, across its
    ends not: of tokens that do over a distance t, blocks of n / m tokens lose m t / n of the variance and two documents
    t / n. So with halves F_2 and quarters F_4 it is F_2 + (F_2 - F_4) / 2. Returns the sum and its second part.
    """
    tokens, draws = np.asarray(run.counts[:, 0].sum(-1, dtype=np.int64)) // run.top_k, max(4, _DRAWS // len(a))
    shorter = np.where(tokens[a] <= tokens[b], a, b)
    longer = a + b - shorter
    wanted = np.zeros(len(tokens), bool)
    wanted[a] = wanted[b] = True
    seeds, rows = draw.integers(0, 2**63, len(a)), Rows.of(run)
    out = np.empty((2, len(a), len(run.layers)))
    bytes_each = int(tokens[wanted].sum()) * run.top_k
    for some in layer_groups(range(len(run.layers)), bytes_each):
        layers = [int(run.layers[position]) for position in some]
        ids: dict[int, NDArray[Any]] = {}
        for _, part in run.iter_documents(layers=layers, kinds=("ids",)):
            if wanted[row := int(rows(part.doc[:1])[0])]:
                ids[row] = part.ids
        counts = run.counts[:, some].astype(np.int64)
        for pair, (x, y) in enumerate(zip(shorter, longer, strict=True)):
            own = np.random.default_rng(seeds[pair])  # the same blocks in all layers
            whole = counts[x] + counts[y]
            found = []
            for parts in (2, 4):
                dealt = _blocks(ids[x], ids[y], min(parts, ids[x].shape[1]), draws, run.num_experts, own)
                found.append(_js(_share(dealt), _share(whole - dealt)).mean(0))
            out[:, pair, some] = found[0] + (found[0] - found[1]) / 2, (found[0] - found[1]) / 2
    return out[0], out[1]


def _blocks(
    short: NDArray[Any], long: NDArray[Any], parts: int, draws: int, experts: int, draw: np.random.Generator
) -> NDArray[np.int32]:
    """[draws, L, E] counts of `parts` blocks of ids [L, n, K] of both documents, as many tokens as `short` has."""
    n, other = short.shape[1], long.shape[1]
    edges = np.arange(parts + 1) * n // parts
    slots = other // -(-n // parts)  # of `long`, each as long as the longest block
    picked = []
    for _ in range(draws):
        mine = int(parts * n / (n + other) + draw.random())
        order, places = draw.permutation(parts), draw.permutation(slots)
        for at, block in enumerate(order):
            start, stop = edges[block], edges[block + 1]
            if at >= mine:
                begin = places[at - mine] * (other // slots)
                picked.append(long[:, begin : begin + stop - start])
            else:
                picked.append(short[:, start:stop])
    slot = np.repeat(np.arange(draws), n)
    return count_picks(np.concatenate(picked, 1), slot, draws, experts)


def _repaired(run: RunLike, pairs: _Pairs, permutations: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """[R, L] mean divergence of re-formed pairs.

    Re-pairing leaves the documents and with them the entropies of their own shares: only that of the middle changes.
    """
    total = np.zeros((permutations, pairs.value.shape[1]))
    for name in sorted(set(pairs.stratum), key=str):
        here = np.array([at for at, one in enumerate(pairs.stratum) if one == name])
        a, b = pairs.first[here], pairs.second[here]
        total += pairs.value[here].sum(0) - _middles(run, a, b).sum(0)
        if len(here) > permutations:
            for one in total:
                one += _middles(run, a, b[draw.permutation(len(here))]).sum(0)
            continue
        order = np.stack([draw.permutation(len(here)) for _ in range(permutations)])
        for at, row in enumerate(a):
            total += _middles(run, np.full_like(b, row), b)[order[:, at]]
    return total / len(pairs.stratum)


def _middles(run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """[P, L] entropy of the mean of the shares of the documents in rows a and b."""
    found = [entropy((_share(run.counts[a[s]]) + _share(run.counts[b[s]])) / 2) for s in _slices(run, len(a))]
    return np.asarray(torch.cat(found).numpy())


def _slices(run: RunLike, pairs: int, draws: int = 1) -> list[slice]:
    size = chunk_rows(draws * int(np.prod(run.counts.shape[1:])))
    return [slice(start, start + size) for start in range(0, pairs, size)]
