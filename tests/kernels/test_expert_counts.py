"""103 and 90 experts on the Triton backend, at sizes that its interpreter can do."""

import pytest

from .. import expert_counts

pytestmark = pytest.mark.parametrize("E", expert_counts.COUNTS)


def test_gate(E, device):
    expert_counts.check_gate(E, "triton", device, T=9)


def test_experts_forward_backward_and_lora(E, device):
    expert_counts.check_experts(E, "triton", device, T=9)
