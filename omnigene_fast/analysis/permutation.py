"""Jensen-Shannon divergences with one document left out, and under permuted labels: the heavy sums, in torch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .groups import Groups, chunk_rows


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


def null_pair(groups: Groups, a: int, b: int, permutations: int, seed: int) -> NDArray[np.float64]:
    """[R, L] divergence in nats of groups a and b when their documents' labels are permuted among these two."""
    rows = np.concatenate([groups.rows[a], groups.rows[b]])
    flat, exact = _flatten(groups.counts[rows])
    shape = groups.counts.shape[1:]
    total = (groups.sums[a] + groups.sums[b]).reshape(-1)
    labels = np.zeros(len(rows), np.bool_)
    labels[: len(groups.rows[a])] = True
    draw = np.random.default_rng([seed, a, b])
    out = np.empty((permutations, shape[0]))
    for start in range(0, permutations, size := min(chunk_rows(4 * flat.shape[1]), chunk_rows(len(rows)))):
        stop = min(start + size, permutations)
        chosen = draw.permuted(np.broadcast_to(labels, (stop - start, len(rows))), axis=1)
        first = (torch.from_numpy(chosen).to(exact) @ flat).to(torch.float64)
        second = (torch.from_numpy(total) - first).view(-1, *shape)
        first = first.view(-1, *shape)
        first /= first.sum(-1, keepdim=True)
        second /= second.sum(-1, keepdim=True)
        halves = (entropy(first) + entropy(second)) / 2
        out[start:stop] = (entropy(first.add_(second).div_(2)) - halves).numpy()
    return out


def null_mean(groups: Groups, permutations: int, seed: int) -> NDArray[np.float64]:
    """[R, L] mean divergence in nats over all pairs when the labels of all documents are permuted."""
    rows = np.concatenate(groups.rows)
    flat, exact = _flatten(groups.counts[rows])
    shape, G = groups.counts.shape[1:], len(groups.names)
    labels = np.repeat(np.arange(G, dtype=np.int16), groups.docs)
    draw = np.random.default_rng([seed, G])
    out = np.empty((permutations, shape[0]))
    size = min(chunk_rows(3 * G * flat.shape[1]), chunk_rows(G * len(rows)))
    for start in range(0, permutations, size):
        stop = min(start + size, permutations)
        drawn = draw.permuted(np.broadcast_to(labels, (stop - start, len(rows))), axis=1)
        member = torch.from_numpy(drawn)[:, None] == torch.arange(G, dtype=torch.int16)[:, None]  # [R, G, D]
        sums = (member.to(exact).reshape(-1, len(rows)) @ flat).to(torch.float64).view(-1, G, *shape)
        out[start:stop] = mean_of_sums(sums)[0].numpy()
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


def _flatten(counts: NDArray[np.int32]) -> tuple[Tensor, torch.dtype]:
    """Counts as [documents, L * E] in the narrowest type in which every sum over documents is exact."""
    largest = np.abs(counts).sum(0, dtype=np.int64).max()
    exact = torch.float32 if largest < 1 << 24 else torch.float64
    return torch.from_numpy(np.ascontiguousarray(counts.reshape(len(counts), -1))).to(exact), exact
