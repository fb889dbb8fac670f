"""103 and 90 experts on the C++ path and in the reference; tests/kernels has the Triton backend."""

import pytest
import torch

from . import expert_counts
from .helpers import backend_params

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.parametrize("backend", backend_params()),
    pytest.mark.parametrize("E", expert_counts.COUNTS),
]


@pytest.mark.parametrize("T", [2, 33])
def test_gate(E, backend, T):
    expert_counts.check_gate(E, backend, CPU, T)


def test_experts_forward_backward_and_lora(E, backend):
    expert_counts.check_experts(E, backend, CPU, T=65, H=67, I=35)


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_8_bits(E, backend, stored):
    expert_counts.check_8_bits(E, backend, CPU, stored, T=65)


def test_model_and_trace(E, backend):
    expert_counts.check_model(E, backend, CPU)
