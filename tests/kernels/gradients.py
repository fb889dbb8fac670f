"""Gradients of the experts three ways: by the Triton backend, by transformers' eager path, and in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from omnigene_fast import reference
from omnigene_fast.backends import PLAIN, Lora, Scales
from omnigene_fast.backends import triton as backend

from .. import helpers

NAMES = ("hidden", "gate_up_proj", "down_proj", "weights", "gate_up_lhs", "gate_up_rhs", "down_lhs", "down_rhs")
FROZEN = (True, False, False, True, False, False, False, False)
FULL = (True, True, True, True, False, False, False, False)
LORA = (True, False, False, True, True, True, True, True)
EVERYTHING = (True,) * 8


class Case(NamedTuple):
    """Arguments of the experts' backward; `inputs` in the order of NAMES, None where there is no low-rank update.

    `stock` and `truth` know nothing of `scales`: they want a case that has the dequantised weights."""

    experts: torch.nn.Module
    inputs: tuple[Tensor | None, ...]
    index: Tensor
    grad_out: Tensor
    activation: str
    scales: Scales = PLAIN

    @property
    def lora(self) -> Lora:
        return Lora(*self.inputs[4:])

    def with_inputs(self, **changes: Tensor) -> "Case":
        values = dict(zip(NAMES, self.inputs, strict=True)) | changes
        return self._replace(inputs=tuple(values.values()))


def make(
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    E: int = 6,
    K: int = 2,
    H: int = 40,
    I: int = 24,  # noqa: E741
    *,
    ranks: tuple[int, int] | None = None,
    mode: str = "uniform",
    magnitude: float = 1.0,
    activation: str = "gelu_tanh",
    seed: int = 0,
) -> Case:
    """Gates of about `magnitude`; with `ranks` (of gate_up and down) updates about as large as the projections."""
    hf = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    experts = helpers.stock_experts(E, H, I, dtype, seed=seed, activation=hf).to(device)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    hidden, grad_out = normal(T, H, scale=magnitude), normal(T, H)
    factors: tuple[Tensor | None, ...] = (None,) * 4
    if ranks is not None:
        r, s = ranks
        factors = (
            normal(E, 2 * I, r, scale=r**-0.5),
            normal(E, r, H, scale=H**-0.5),
            normal(E, H, s, scale=s**-0.5),
            normal(E, s, I, scale=I**-0.5),
        )
    index, weights = (tensor.to(device) for tensor in helpers.routing(mode, T, K, E, seed))
    inputs = (hidden, experts.gate_up_proj.detach(), experts.down_proj.detach(), weights, *factors)
    return Case(experts, inputs, index, grad_out, activation)


def forward(case: Case, save: bool, choice=None, expert_parallel: bool = False) -> tuple[Tensor, Tensor | None]:
    hidden, gate_up, down, weights, *_ = case.inputs
    return backend.expert_mlp(
        hidden,
        gate_up,
        down,
        case.index,
        weights,
        case.lora,
        case.activation,
        expert_parallel,
        save,
        case.scales,
        choice,
    )


def backward(
    case: Case,
    needed: Sequence[bool],
    preactivation: Tensor | None = None,
    choice=None,
    expert_parallel: bool = False,
) -> tuple[Tensor | None, ...]:
    hidden, gate_up, down, weights, *_ = case.inputs
    return backend.expert_mlp_bwd(
        case.grad_out,
        hidden,
        gate_up,
        down,
        case.index,
        weights,
        case.lora,
        preactivation,
        case.activation,
        expert_parallel,
        needed,
        case.scales,
        choice,
    )


def _leaves(case: Case, dtype: torch.dtype | None) -> list[Tensor | None]:
    return [None if x is None else (x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in case.inputs]


def _gradients(out: Tensor, leaves: list[Tensor | None], grad_out: Tensor) -> list[Tensor | None]:
    present = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, present, grad_out.to(out.dtype)))
    return [None if x is None else next(found) for x in leaves]


def truth(case: Case) -> list[Tensor | None]:
    """torch's own gradients of the reference, in float64."""
    leaves = _leaves(case, torch.float64)
    hidden, gate_up, down, weights, *factors = leaves
    updates = {} if factors[0] is None else {"gate_up_lora": factors[:2], "down_lora": factors[2:]}
    out = reference.expert_mlp(hidden, gate_up, down, case.index, weights, activation=case.activation, **updates)
    return _gradients(out, leaves, case.grad_out)


def stock(case: Case) -> list[Tensor | None]:
    """torch's own gradients of transformers' eager path in the case's dtype; low-rank updates merged, as PEFT does."""
    leaves = _leaves(case, None)
    hidden, gate_up, down, weights, *factors = leaves
    if factors[0] is not None:
        gate_up, down = gate_up + factors[0] @ factors[1], down + factors[2] @ factors[3]
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    arguments = (hidden, case.index, weights.to(hidden.dtype))
    return _gradients(torch.func.functional_call(case.experts, parameters, arguments), leaves, case.grad_out)


def check(case: Case, ours: Sequence[Tensor | None], needed: Sequence[bool], what: str = "") -> None:
    """The criterion for every gradient that was needed; nothing else was computed."""
    for name, x, need, *grads in zip(NAMES, case.inputs, needed, ours, stock(case), truth(case), strict=True):
        out, theirs, exact = grads
        if not need or x is None:
            assert out is None, f"{what} {name}: not needed, yet computed"
            continue
        assert (out.dtype, out.shape) == (x.dtype, x.shape)
        helpers.assert_as_accurate(out, theirs, exact, f"{what} d_{name}")
