"""Resources of every kernel in every configuration, compiled for GPUs that need not be there (see aot.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GEMMS = {"expert_up_fwd", "expert_down_bwd", "grouped_gemm", "grouped_gram", "route_fwd"}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def rows():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), "--json"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def offenders(rows, bad):
    return [f"sm_{row['arch']} {row['kernel']} {row['what']} {row['blocks']}: {row}" for row in rows if bad(row)]


def test_every_kernel_is_compiled_for_every_architecture(rows):
    kernels = GEMMS | {"dispatch_fwd", "combine_fwd", "expert_weights_bwd"}
    kernels |= {"norm_scale_fwd", "topk_gate_fwd", "norm_scale_bwd", "topk_gate_bwd"}
    assert {(row["arch"], row["kernel"]) for row in rows} == {(arch, k) for arch in (80, 90, 100) for k in kernels}


def test_nothing_spills(rows):
    assert not offenders(rows, lambda row: row["stack"] or row["local"])


def test_shared_memory_fits(rows):
    assert not offenders(rows, lambda row: row["shared"] > row["shared_limit"])


def test_half_gemms_use_tensor_cores(rows):
    """wgmma and tcgen05 take 64 rows; below, and before Hopper, the instruction is mma.sync."""

    def expected(row):
        wide = {90: "wgmma", 100: "tcgen05"}.get(row["arch"])
        return wide if wide and row["gemm_rows"] >= 64 else "mma"

    gemms = [row for row in rows if row["gemm_rows"]]
    assert {row["kernel"] for row in gemms} == GEMMS
    assert not offenders(gemms, lambda row: row["tensor_core"] != expected(row))


def test_aligned_gemms_copy_sixteen_bytes_at_a_time(rows):
    """All operands, all stages of the pipeline; tiles 16 columns wide have fewer bytes than that."""
    gemms = [row for row in rows if row["aligned"] and row["kernel"] in GEMMS - {"route_fwd"}]
    assert {row["kernel"] for row in gemms} == GEMMS - {"route_fwd"}
    assert not offenders(gemms, lambda row: not row["wide_copies"])
    wide = [row for row in gemms if int(row["blocks"].split("x")[1]) >= 32]
    assert not offenders(wide, lambda row: row["wide_copies"] < row["pipeline_copies"])


def test_float32_is_never_multiplied_in_tf32(rows):
    assert not offenders(rows, lambda row: "float32" in row["what"] and row["tensor_core"])


def test_offsets_are_multiplied_in_64_bits(rows):
    """Known bug: row * stride passes 2^31 near 95,000 tokens. Dispatch multiplies nothing larger than T * K."""
    assert not offenders(rows, lambda row: row["kernel"] != "dispatch_fwd" and row["narrow_products"])


def test_a_trace_that_is_not_open_costs_nothing(rows):
    """A pointer that is None is no parameter, and nothing is stored through it: the other outputs are 4 or 8 bytes."""
    arguments = {"route_fwd": 15, "topk_gate_fwd": 9}
    gates = [row for row in rows if row["kernel"] in arguments and row["what"] != "all sizes 1"]
    traces = [(), ("*u8",), ("*u8", "*fp16", "*fp16"), ("*i16",), ("*i16", "*fp16", "*fp16")]
    compiled = {(row["arch"], row["kernel"], tuple(row["trace"])) for row in gates}
    assert compiled == set(product((80, 90, 100), arguments, traces))
    assert not offenders(gates, lambda row: row["parameters"] != arguments[row["kernel"]] + len(row["trace"]))
    assert not offenders(gates, lambda row: bool(row["narrow_stores"]) != bool(row["trace"]))


def test_no_binary_is_bloated(rows):
    """Unrolled top-k rounds once made 0.9 MB of PTX; the largest kernel here, a GEMM before erf, stays far below."""
    assert not offenders(rows, lambda row: row["cubin_bytes"] > 400_000)
