"""Rules for every test: one thread, and no luck with uninitialised memory."""

import os

import pytest
import torch

os.environ.setdefault("OMNIGENE_FAST_TUNED", "")  # what the user of this machine has tuned is not under test


@pytest.fixture(autouse=True, scope="session")
def _strict_torch():
    """`torch.empty` is filled with NaN (integers: their largest value), so that reading it shows."""
    torch.set_num_threads(1)  # tiny shapes: more threads only spin
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
