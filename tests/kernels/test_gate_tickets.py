"""The last program of a token selects, and only it: tickets, their reset, and calls that overlap."""

import pytest
import torch

from omnigene_fast.backends import triton as backend
from omnigene_fast.kernels import gate, tickets

from .. import helpers

E, K, H, SPLITS, BLOCK_N = 12, 3, 40, 4, 4  # the fourth program of a token has no expert left to project
SENTINEL = -7.0


class Call:
    """One token and its outputs; `run(programs)` launches the first of its four programs, in order."""

    def __init__(self, device, seed):
        self.router = helpers.stock_router(E, K, H, torch.bfloat16).to(device)
        self.hidden = torch.randn(1, H, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        self.outputs = (
            torch.full((1, E), SENTINEL, device=device),
            torch.full((1, K), SENTINEL, device=device),
            torch.full((1, K), -7, device=device),
        )

    def run(self, ticket, programs=SPLITS):
        gate._route_token_fwd_kernel[(programs,)](
            self.hidden,
            self.router.proj.weight,
            self.router.scale,
            self.router.per_expert_scale,
            *self.outputs,
            None,
            None,
            None,
            ticket,
            1,
            H,
            E,
            K,
            self.router.eps,
            H**-0.5,
            H,
            H,
            NUMERICS="hf",
            SPLITS=SPLITS,
            BLOCK_N=BLOCK_N,
            BLOCK_H=64,
            BLOCK_E=16,
            BLOCK_K=4,
            ROWS=8,
            num_warps=8,
        )

    def expected(self):
        arguments = helpers.router_arguments(self.router)
        order = ("proj_weight", "scale", "per_expert_scale", "top_k", "eps")
        return backend.route(self.hidden, *(arguments[name] for name in order), "hf")

    def is_right(self):
        return all(torch.equal(ours, wanted) for ours, wanted in zip(self.outputs, self.expected(), strict=True))


def zero(device):
    return torch.zeros(1, dtype=torch.int32, device=device)


def test_only_the_last_program_selects(device):
    call, ticket = Call(device, 1), zero(device)
    call.run(ticket, SPLITS - 1)
    assert ticket.item() == SPLITS - 1
    assert call.outputs[1].eq(SENTINEL).all()
    assert call.outputs[2].eq(-7).all()
    assert not call.outputs[0].eq(SENTINEL).any()  # all logits are there; the fourth program has none
    call.run(ticket, 1)
    assert ticket.item() == 0
    assert call.is_right()


def test_the_next_call_finds_zeros(device):
    ticket = zero(device)
    for seed in range(3):
        call = Call(device, seed)
        call.run(ticket)
        assert ticket.item() == 0
        assert call.is_right()


def test_negative_control_a_ticket_that_was_not_reset_fails(device):
    """The call selects before all logits are there."""
    call, ticket = Call(device, 1), zero(device)
    ticket.fill_(2)
    call.run(ticket)
    assert ticket.item() != 0
    assert not call.is_right()


@pytest.mark.parametrize("shared", [False, True])
def test_calls_that_overlap_need_tickets_of_their_own(device, shared):
    one, two = Call(device, 1), Call(device, 2)
    first = zero(device)
    second = first if shared else zero(device)
    one.run(first, 2)
    two.run(second, 3)
    one.run(first, 2)
    two.run(second, 1)
    # `one` has now run programs 0, 1, 0, 1: the logits of program 2 are missing, so only `two` can be right.
    assert two.is_right() == (not shared)
    assert (first.item() == 0) == (not shared) or shared


def test_counters_of_a_stream_are_used_again_and_never_run_out(device, monkeypatch):
    monkeypatch.setattr(tickets, "_arenas", {})
    monkeypatch.setattr(tickets, "CAPACITY", 300)
    where = torch.empty(0, device=device).device
    mine = tickets.tickets(where, 5)
    assert mine.eq(0).all()
    assert tickets.tickets(where, 5).data_ptr() == mine.data_ptr()
    many = tickets.tickets(where, tickets.PER_STREAM + 1)
    assert many.numel() == tickets.PER_STREAM + 1
    assert many.eq(0).all()
    assert many.data_ptr() != mine.data_ptr()
    arena = tickets._arenas[where]
    assert arena.take(44).numel() == 44
    assert arena.take(1) is None


def test_the_launcher_leaves_zeros(device):
    call = Call(device, 1)
    expected = call.expected()
    for _ in range(2):
        assert all(torch.equal(ours, before) for ours, before in zip(call.expected(), expected, strict=True))
    where = torch.empty(0, device=device).device
    assert tickets._arenas[where].counters.eq(0).all()


@pytest.mark.gpu
def test_graphs_replay_beside_each_other():
    """Two graphs captured on one stream, replayed on two at once, beside launches on a third: every result is right."""
    calls, graphs, outputs = [Call("cuda", seed) for seed in (1, 2)], [], []
    wanted = [call.expected() for call in calls]
    torch.cuda.synchronize()
    for call in calls:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(call.expected())
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        again = calls[0].expected()
        torch.cuda.synchronize()
        assert all(torch.equal(ours, right) for ours, right in zip(again, wanted[0], strict=True))
        for ours, right in zip(outputs, wanted, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, right, strict=True))
