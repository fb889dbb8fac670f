"""Combine: order of the sum, rows of no expert, many experts per token."""

import pytest
import torch

from omnigene_fast.kernels.combine import launch_combine_fwd


def case(device, T, K, H, dtype):
    y = torch.randn(T * K, H, dtype=dtype, device=device)
    position = torch.randperm(T * K, device=device).to(torch.int32)
    return y, position, torch.randn(T, K, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "H"), [(1, 40), (8, 47), (17, 1025)])
def test_sums_in_the_order_of_the_index(device, K, H, dtype):
    y, position, weights = case(device, 3, K, H, dtype)
    out = launch_combine_fwd(y, position, weights, K)
    total = torch.zeros(3, H, dtype=torch.float64, device=device)
    for k in range(K):  # a fused multiply-add rounds once: exact product, float32 sum
        total = (total + weights[:, k, None].double() * y[position.view(3, K)[:, k].long()].double()).float().double()
    error = (out.double() - total).norm() / total.norm()
    assert error <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    if dtype != torch.float32:
        assert (out == total.to(dtype)).float().mean() > 0.99


def test_rows_of_no_expert_are_not_read(device):
    y, position, weights = case(device, 4, 3, 40, torch.float32)
    expected = launch_combine_fwd(y, position, torch.where(position.view(4, 3) == 5, 0, weights), 3)
    y[5] = torch.nan
    weights = torch.where(position.view(4, 3) == 5, torch.nan, weights)
    out = launch_combine_fwd(y, torch.where(position == 5, -1, position), weights, 3)
    assert torch.equal(out, expected)
    nobody = launch_combine_fwd(y, torch.full_like(position, -1), weights, 3)
    assert torch.equal(nobody, torch.zeros_like(nobody))


def test_without_weights_each_is_one(device):
    y, position, weights = case(device, 4, 3, 40, torch.bfloat16)
    out = launch_combine_fwd(y, position, None, 3)
    assert torch.equal(out, launch_combine_fwd(y, position, torch.ones_like(weights), 3))
    with_gap = launch_combine_fwd(y, torch.where(position == 5, -1, position), None, 3)
    assert not torch.equal(with_gap, out)
    y[5] = 0
    assert torch.equal(with_gap, launch_combine_fwd(y, position, None, 3))
