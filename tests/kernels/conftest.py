"""Where the kernel tests run: on a GPU if there is one, else in Triton's interpreter, which needs a process of its own.

Triton reads TRITON_INTERPRET when it is imported, for the whole process. So without a GPU and without that variable the
tests of this folder that launch kernels are left to `test_in_interpreter.py`, which runs pytest again with it set.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
LAUNCHING = [
    "test_combine.py",
    "test_dispatch.py",
    "test_expert_backward.py",
    "test_expert_counts.py",
    "test_expert_forward.py",
    "test_expert_low_bits.py",
    "test_expert_strides.py",
    "test_expert_tma.py",
    "test_gate.py",
    "test_gate_backward.py",
    "test_gate_tickets.py",
    "test_gate_trace.py",
    "test_trace_model.py",
    "test_tune_kernels.py",
]

collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else LAUNCHING
if INTERPRETED:
    collect_ignore = ["test_in_interpreter.py", "test_aot.py", "test_resources.py", "test_triton_backend.py"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and not INTERPRETED:
        return
    reason = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "torch finds no CUDA GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device():
    """The device of the kernel tests: CPU tensors in the interpreter, else CUDA."""
    return torch.device("cpu" if INTERPRETED else "cuda")
