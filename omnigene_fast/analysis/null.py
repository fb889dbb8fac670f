"""Jensen-Shannon divergences with one document left out, and where nothing differs: the heavy sums, in torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .groups import Groups, chunk_rows, total


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, 0 ln 0 = 0."""
    return -(p.clamp_min(1e-300).log_().mul_(p)).sum(-1)


def pair_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """[G, G, L] divergence in nats of every two of the distributions [G, L, E]."""
    shares = torch.from_numpy(p)
    own = entropy(shares)
    rows = [entropy((shares[g] + shares) / 2) - (own[g] + own) / 2 for g in range(len(p))]
    values = torch.stack(rows).clamp_min_(0).numpy()
    values[np.arange(len(p)), np.arange(len(p))] = 0
    return values


def deleted_pairs(groups: Groups) -> list[NDArray[np.float64]]:
    """Per group [n, G, L]: its divergence in nats from every group when each of its n documents in turn is left out.

    The column of the group itself is 0.
    """
    shares = torch.from_numpy(groups.probabilities)
    own = entropy(shares)
    found = []
    for g in range(len(groups.names)):
        out = torch.zeros(len(groups.rows[g]), len(groups.names), len(groups.layers), dtype=torch.float64)
        start = 0
        for counts in groups.without_one(g):
            left = torch.from_numpy(counts)
            left /= left.sum(-1, keepdim=True)  # NaN if nothing is left
            mine, stop = entropy(left), start + len(left)
            for h in range(len(groups.names)):
                if h != g:
                    out[start:stop, h] = entropy((left + shares[h]) / 2) - (mine + own[h]) / 2
            start = stop
        found.append(out.numpy())
    return found


def null_mean(groups: Groups, chosen: Sequence[int], flips: int, seed: Sequence[int]) -> NDArray[np.float64]:
    """[R, L] mean divergence in nats over the pairs of some groups, in worlds in which they are all routed alike.

    In such a world every group has the shares of all of them together, and each of its documents departs from them as
    it did, to the one side or to the other: document d of group g adds +-(c_d - n_d p) / (1 - h_d)^(1/4) / N_g to the
    shares p, with its counts c_d, its picks n_d, the picks N_g of its group and its part h_d of all picks. So lengths
    and dispersion may differ between groups, which a permutation of labels takes for a difference of routing (wild
    bootstrap with the null imposed: Cameron, Gelbach and Miller 2008). Residuals are too small by about 1 - h_d where
    all counts vary alike; with the whole of it (an exponent of 1/2) the test hardly ever rejects, with none of it
    (0) it does too often where few long documents meet many short ones (bench/simulations).

    Args:
        chosen: positions of at least two groups.
        flips: R, draws of a side for every document, the same in all layers.
        seed: of the draws.
    """
    rows = [groups.rows[g] for g in chosen]
    shape = groups.counts.shape[1:]
    total = groups.sums[list(chosen)].sum(0)
    pooled = total / total.sum(-1, keepdims=True)
    departures = []
    for g, mine in zip(chosen, rows, strict=True):
        counts = groups.counts[mine].astype(np.float64)
        picks = counts.sum(-1, keepdims=True)
        part = np.minimum(picks / total.sum(-1, keepdims=True), 1 - 1e-9)
        counts -= picks * pooled
        counts /= (1 - part) ** 0.25 * groups.sums[g].sum(-1, keepdims=True)
        departures.append(torch.from_numpy(counts.reshape(len(mine), -1)))
    draw = np.random.default_rng(seed)
    out = np.empty((flips, shape[0]))
    documents = sum(map(len, rows))
    size = min(chunk_rows(3 * len(rows) * pooled.size), chunk_rows(documents))
    for start in range(0, flips, size):
        stop = min(start + size, flips)
        sides = torch.from_numpy(2.0 * draw.integers(0, 2, (stop - start, documents)) - 1)
        shares = torch.empty(stop - start, len(rows), *shape, dtype=torch.float64)
        for place, (side, departure) in enumerate(zip(sides.split([*map(len, rows)], 1), departures, strict=True)):
            shares[:, place] = (side @ departure).view(-1, *shape)
        out[start:stop] = mean_of_sums(shares.add_(torch.from_numpy(pooled)).clamp_min_(0))[0].numpy()
    return out


def null_swap(before: Groups, after: Groups, permutations: int, seed: int) -> NDArray[np.float64]:
    """[2, R, L] change of the mean over pairs when each document's two checkpoints are swapped with probability 1/2.

    First of the divergence, then of its square root. `before` and `after` hold the same documents in the same order.
    """
    G, shape = len(before.names), before.counts.shape[1:]
    moves = [_flatten(after.counts[y] - before.counts[x]) for x, y in zip(before.rows, after.rows, strict=True)]
    old, new = torch.from_numpy(before.sums), torch.from_numpy(after.sums)
    draw = np.random.default_rng([seed, 2])
    out = np.empty((2, permutations, shape[0]))
    size = chunk_rows(5 * old.numel() + sum(before.docs))
    for start in range(0, permutations, size):
        stop = min(start + size, permutations)
        moved = torch.empty(stop - start, G, *shape, dtype=torch.float64)
        for g, (flat, exact) in enumerate(moves):
            swap = draw.random((stop - start, len(flat))) < 0.5
            moved[:, g] = (torch.from_numpy(swap).to(exact) @ flat).view(-1, *shape)
        changes = zip(mean_of_sums(old + moved), mean_of_sums(new - moved), strict=True)
        for kind, (x, y) in enumerate(changes):
            out[kind, start:stop] = (y - x).numpy()
    return out


def mean_of_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """[R, L] mean over pairs of groups of the divergence of counts [R, G, L, E], which it overwrites; of its root."""
    sums /= sums.sum(-1, keepdim=True)
    own = entropy(sums)
    G = sums.shape[1]
    mean, root = torch.zeros_like(own[:, 0]), torch.zeros_like(own[:, 0])
    for a in range(G):
        for b in range(a + 1, G):
            value = entropy((sums[:, a] + sums[:, b]).div_(2)) - (own[:, a] + own[:, b]) / 2
            mean += value
            root += value.clamp_min_(0).sqrt_()
    pairs = G * (G - 1) / 2
    return mean / pairs, root / pairs


def _flatten(counts: NDArray[Any]) -> tuple[Tensor, torch.dtype]:
    """Counts as [documents, L * E], whole ones in the narrowest type in which every sum over documents is exact."""
    whole = counts.dtype.kind in "iu" and total(np.abs(counts), 0).max() < 1 << 24
    exact = torch.float32 if whole else torch.float64
    return torch.from_numpy(np.ascontiguousarray(counts.reshape(len(counts), -1))).to(exact), exact
