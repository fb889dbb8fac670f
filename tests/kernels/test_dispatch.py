"""Dispatch against a sort by hand: stable order, offsets, tile table, rows of no expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigene_fast.kernels import dispatch as kernels
from omnigene_fast.kernels.dispatch import launch_dispatch_fwd

from .. import helpers


def check(index, E, block_m):
    """Compare a dispatch of `index` with what a person would do."""
    dispatch = launch_dispatch_fwd(index, E, block_m)
    ids = index.cpu().flatten().tolist()
    groups = [[row for row, expert in enumerate(ids) if expert == e] for e in range(E)]
    order = [row for group in groups for row in group]
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group))
    assert dispatch.offsets.tolist() == starts
    assert dispatch.order.tolist()[: len(order)] == order
    place = {row: position for position, row in enumerate(order)}
    assert dispatch.position.tolist() == [place.get(row, -1) for row in range(len(ids))]

    assert dispatch.num_tiles == len(ids) // block_m + min(E, len(ids))
    tiles = list(zip(dispatch.tile_expert.tolist(), dispatch.tile_start.tolist(), strict=True))
    wanted = [(e, start) for e in range(E) for start in range(starts[e], starts[e + 1], block_m)]
    assert [tile for tile in tiles if tile[0] != -1] == wanted
    return dispatch


@pytest.mark.parametrize("mode", helpers.ROUTINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 129])
def test_routings(device, mode, T):
    index, _ = helpers.routing(mode, T, 4, 16, seed=T)
    check(index.to(device), 16, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_block_sizes_and_index_dtypes(device, dtype):
    """4096 rows at a time from 513 rows on; the last block is partly filled."""
    for T in (256, 257, 2500):
        index, _ = helpers.routing("language", T, 2, 6, seed=T)
        check(index.to(device, dtype), 6, 64)


def test_everything_to_one_expert(device):
    for expert in (0, 3, 5):
        check(torch.full((33, 2), expert, device=device), 6, 16)


def test_ids_of_no_expert_have_no_position(device):
    index = torch.tensor([[0, -1], [6, 2], [2, 7], [-5, 5], [1 << 30, 2]], device=device)
    dispatch = check(index, 6, 16)
    assert (dispatch.position == -1).sum() == 5
    check(torch.full((5, 2), 6, device=device), 6, 16)


def test_strided_index(device):
    check(torch.arange(24, device=device).view(6, 4).t().remainder(5), 5, 16)


@pytest.fixture
def counted(monkeypatch):
    """The form for many rows, for few of them: sections of 16 rows, at most 4 sections."""
    monkeypatch.setattr(kernels, "ONE_LAUNCH_ROWS", 0)
    monkeypatch.setattr(kernels, "SECTION_STEP", 16)
    monkeypatch.setattr(kernels, "MAX_SECTIONS", 4)


@pytest.mark.parametrize("mode", helpers.ROUTINGS)
@pytest.mark.parametrize("T", [1, 4, 5, 17, 129])
def test_many_rows(device, counted, mode, T):
    """One section and several, of one step and several; fewer sections than experts and more."""
    for E in (2, 16, 200) if mode == "uniform" else (16,):
        index, _ = helpers.routing(mode, T, min(4, E), E, seed=T)
        check(index.to(device), E, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_many_rows_of_which_some_belong_to_no_expert(device, counted, dtype):
    index = torch.randint(-3, 10, (33, 3), dtype=dtype, device=device)
    index[4, 1] = 1 << 30
    check(index, 6, 16)
    check(torch.full((33, 2), 6, dtype=dtype, device=device), 6, 16)
    check(torch.full((33, 2), 5, dtype=dtype, device=device), 6, 16)


def test_the_second_form_begins_past_4096_rows(device):
    index, _ = helpers.routing("language", 1025, 4, 6, seed=0)
    check(index.to(device), 6, 64)


def test_negative_control_an_unstable_order_fails(device, counted, monkeypatch):
    """Two rows of one expert, the last of a section and the first of the next, change places."""

    def unstable(*arguments):
        dispatch = launch(*arguments)
        dispatch.order[[5, 6]] = dispatch.order[[6, 5]]
        dispatch.position[dispatch.order[5:7].long()] = torch.tensor([5, 6], dtype=torch.int32, device=device)
        return dispatch

    launch = launch_dispatch_fwd
    index = torch.arange(66, device=device).remainder(6).view(33, 2)
    check(index, 6, 16)
    monkeypatch.setitem(globals(), "launch_dispatch_fwd", unstable)
    with pytest.raises(AssertionError):
        check(index, 6, 16)


@settings(max_examples=25, deadline=None)
@given(
    E=st.integers(1, 9),
    top_k=st.integers(1, 3),
    block_m=st.sampled_from([16, 32]),
    ids=st.lists(st.integers(-2, 10), min_size=1, max_size=70),
)
def test_any_index(device, E, top_k, block_m, ids):
    check(torch.tensor(ids * top_k, device=device).view(-1, top_k), E, block_m)
