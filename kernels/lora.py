"""Low-rank updates of the experts' projections, W + lhs @ rhs, as small grouped GEMMs; the sum is never built.

With x the rows that enter a projection, d the gradients of those that leave it, and W' = W + lhs @ rhs:

    x W'^T = x W^T + (x rhs^T) lhs^T,   d W' = d W + (d lhs) rhs,   d_lhs = d^T (x rhs^T),   d_rhs = (d lhs)^T x

so the two narrow products, [N, r], are all that these functions add to the GEMMs of the frozen projection.

| array | shape       | dtype            | meaning                                                                    |
|-------|-------------|------------------|----------------------------------------------------------------------------|
| lhs   | [E, out, r] | bf16, fp16, fp32 | contiguous; r padded to a multiple of 16 by zeros, which aligns the rows   |
| rhs   | [E, r, in]  | same             | likewise                                                                   |
| low   | [N, r]      | same             | x rhs^T or d lhs, by position                                              |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Dispatch
from .grouped_gemm import LowRank, launch_grouped_gemm, launch_grouped_gram
from .tiles import ExpertTiles

RANK_MULTIPLE = 16


@dataclass(frozen=True)
class LoraFactors:
    """A padded pair of factors, and the rank that it had before."""

    lhs: Tensor
    rhs: Tensor
    rank: int


def pad_factors(lhs: Tensor, rhs: Tensor) -> LoraFactors:
    """The factors as this file's table has them; copies of those that are not so already."""
    E, out, rank = lhs.shape
    padded = rank + -rank % RANK_MULTIPLE
    if padded == rank:
        return LoraFactors(lhs.contiguous(), rhs.contiguous(), rank)
    wide_lhs, wide_rhs = lhs.new_zeros((E, out, padded)), rhs.new_zeros((E, padded, rhs.shape[2]))
    wide_lhs[:, :, :rank] = lhs
    wide_rhs[:, :rank] = rhs
    return LoraFactors(wide_lhs, wide_rhs, rank)


def launch_lora_fwd(
    x: Tensor, factors: LoraFactors, dispatch: Dispatch, tiles: ExpertTiles, *, gather: bool = False
) -> LowRank:
    """x rhs^T, with lhs^T as the factor that it goes on to meet; x [N, in] by position, with `gather` [T, in]."""
    rhs = factors.rhs.transpose(1, 2)
    low = launch_grouped_gemm(x, rhs, dispatch, tiles.low_rank.for_rank(rhs.shape[2]), gather=gather)
    return LowRank(low, factors.lhs.transpose(1, 2))


def launch_lora_bwd(
    d: Tensor, factors: LoraFactors, dispatch: Dispatch, tiles: ExpertTiles, *, gather: bool = False
) -> LowRank:
    """d lhs, with rhs as the factor that it goes on to meet; d [N, out] by position, with `gather` [T, out]."""
    tile = tiles.low_rank.for_rank(factors.lhs.shape[2])
    return LowRank(launch_grouped_gemm(d, factors.lhs, dispatch, tile, gather=gather), factors.rhs)


def launch_lora_lhs_bwd(
    d: Tensor, low: Tensor, factors: LoraFactors, dispatch: Dispatch, tiles: ExpertTiles, *, gather: bool = False
) -> Tensor:
    """d_lhs [E, out, rank] from d and low = x rhs^T; `gather`: d is [T, out] by token."""
    d_lhs = torch.empty((*factors.lhs.shape[:2], factors.rank), dtype=d.dtype, device=d.device)
    tile = tiles.low_rank_gram.for_rank(low.shape[1])
    launch_grouped_gram(d, low, d_lhs, dispatch, tile, gather_left=gather)
    return d_lhs


def launch_lora_rhs_bwd(
    x: Tensor, low: Tensor, factors: LoraFactors, dispatch: Dispatch, tiles: ExpertTiles, *, gather: bool = False
) -> Tensor:
    """d_rhs [E, rank, in] from x and low = d lhs; `gather`: x is [T, in] by token.

    The kernel computes its transpose, so that the long side is the one that tensor cores want to be long.
    """
    d_rhs = torch.empty((factors.rhs.shape[0], factors.rank, x.shape[1]), dtype=x.dtype, device=x.device)
    tile = tiles.low_rank_gram.for_rank(low.shape[1])
    launch_grouped_gram(x, low, d_rhs.transpose(1, 2), dispatch, tile, gather_left=gather)
    return d_rhs
