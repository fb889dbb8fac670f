"""Gradients of the experts three ways, ours, transformers' and the truth, and their comparison pooled over problems."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor
from torch.func import functional_call

from omnigene_fast import reference
from omnigene_fast.ops import expert_mlp

from .helpers import FLOOR, routing, stock_experts

PROJECTIONS = ("gate_up_proj", "down_proj")
LORA = ("gate_up_lhs", "gate_up_rhs", "down_lhs", "down_rhs")
NAMES = ("hidden", *PROJECTIONS, "weights", *LORA)  # the order of the operator's gradients
FROZEN, FULL = ("hidden", "weights"), ("hidden", *PROJECTIONS, "weights")


@dataclasses.dataclass
class Problem:
    """Inputs of the experts by name, the routing, and the gradient that comes back."""

    tensors: dict[str, Tensor | None]
    index: Tensor
    grad: Tensor

    def leaves(self, wanted: Collection[str], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """The tensors as leaves of a new graph, in `dtype` if that is given."""
        return {
            name: None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_(name in wanted)
            for name, x in self.tensors.items()
        }


def problem(
    T: int = 65,
    E: int = 16,
    K: int = 4,
    H: int = 67,
    I: int = 35,  # noqa: E741
    *,
    dtype: torch.dtype = torch.float32,
    rank: int | tuple[int, int] = 0,
    mode: str = "uniform",
    magnitude: float = 1.0,
    seed: int = 0,
    index: Tensor | None = None,
) -> Problem:
    """Random inputs; `rank` of the low-rank updates (of one or of each projection, 0 for none)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if index is None:
        index, weights = routing(mode, T, K, E, seed)
    else:
        weights = torch.rand(index.shape, generator=generator)
    T = index.shape[0]
    experts = stock_experts(E, H, I, dtype, seed=seed)

    def randn(*shape: int, over: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(over)).to(dtype)

    tensors: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    tensors |= {"hidden": (magnitude * randn(T, H).double()).to(dtype), "weights": weights}
    tensors |= {name: getattr(experts, name).detach() for name in PROJECTIONS}
    ranks = (rank, rank) if isinstance(rank, int) else rank
    for name, r, rows, columns in (("gate_up", ranks[0], 2 * I, H), ("down", ranks[1], H, I)):
        if r:
            tensors[f"{name}_lhs"] = randn(E, rows, r, over=2 * r)
            tensors[f"{name}_rhs"] = randn(E, r, columns, over=2 * columns)
    return Problem(tensors, index, randn(T, H))


def _pairs(leaves: dict[str, Tensor | None]) -> dict[str, tuple[Tensor, Tensor] | None]:
    return {
        f"{name}_lora": None if leaves[f"{name}_lhs"] is None else (leaves[f"{name}_lhs"], leaves[f"{name}_rhs"])
        for name in ("gate_up", "down")
    }


def _block(leaves: dict[str, Tensor | None], index: Tensor) -> tuple[Tensor | None, ...]:
    return *(leaves[name] for name in ("hidden", *PROJECTIONS)), index, leaves["weights"]


def _results(out: Tensor, leaves: dict[str, Tensor | None], grad: Tensor, *, absent: bool = True) -> dict[str, Tensor]:
    """The output and the gradients; with `absent`, one that autograd did not reach is zero, as it is without tokens."""
    if out.requires_grad or not absent:
        out.backward(grad)
    results = {"out": out.detach()}
    for name, x in leaves.items():
        if x is not None and x.requires_grad:
            assert x.grad is not None or absent, name
            results[name] = torch.zeros_like(x) if x.grad is None else x.grad
    return results


def ours(p: Problem, wanted: Collection[str] = NAMES, grad: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The output and the wanted gradients of `ops.expert_mlp`."""
    leaves = p.leaves(wanted)
    options = {"activation": "gelu_tanh"} | options
    out = expert_mlp(*_block(leaves, p.index), **_pairs(leaves), **options)
    return _results(out, leaves, p.grad if grad is None else grad, absent=False)


def stock(p: Problem, wanted: Collection[str] = NAMES, activation: str = "gelu_pytorch_tanh") -> dict[str, Tensor]:
    """Those of transformers' eager experts in the same dtype; a low-rank update is merged first, as PEFT does."""
    leaves = p.leaves(wanted)
    merged = {}
    for name, lhs, rhs in ((PROJECTIONS[0], *LORA[:2]), (PROJECTIONS[1], *LORA[2:])):
        weight = leaves[name]
        merged[name] = weight if leaves[lhs] is None else torch.baddbmm(weight, leaves[lhs], leaves[rhs])
    E, H, I = leaves["down_proj"].shape  # noqa: E741
    experts = stock_experts(E, H, I, p.grad.dtype, activation=activation)
    out = functional_call(experts, merged, (leaves["hidden"], p.index, leaves["weights"]))
    return _results(out, leaves, p.grad)


def truth(p: Problem, wanted: Collection[str] = NAMES, activation: str = "gelu_tanh") -> dict[str, Tensor]:
    """Those of the reference by torch's autograd in float64."""
    leaves = p.leaves(wanted, torch.float64)
    out = reference.expert_mlp(*_block(leaves, p.index), activation=activation, **_pairs(leaves))
    return _results(out, leaves, p.grad.double())


class Comparison:
    """Errors of several problems together, because a gradient of a few elements can be exact by luck."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, mine: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> "Comparison":
        assert set(mine) == set(exact)
        for name, expected in exact.items():
            assert mine[name].shape == expected.shape, name
            assert mine[name].dtype == theirs[name].dtype, name
            sums = self._squares[name]
            for n, out in enumerate((mine[name], theirs[name])):
                difference = (out.double() - expected).square().sum().item()
                sums[n] += difference if math.isfinite(difference) else math.inf
            sums[2] += expected.square().sum().item()
        return self

    def check(self) -> None:
        """At most twice the error of transformers in the same dtype, for every gradient and the output."""
        for name, (mine, theirs, norm) in self._squares.items():
            mine, theirs = (math.sqrt(x / norm) if norm else math.sqrt(x) for x in (mine, theirs))
            assert mine <= 2 * theirs + FLOOR, f"{name}: relative error {mine:.3e}, transformers' own {theirs:.3e}"


def assert_as_accurate(p: Problem, wanted: Collection[str] = NAMES, **options) -> dict[str, Tensor]:
    """Ours by the criterion, for one problem; returns ours."""
    mine = ours(p, wanted, **options)
    Comparison().add(mine, stock(p, wanted), truth(p, wanted)).check()
    return mine
