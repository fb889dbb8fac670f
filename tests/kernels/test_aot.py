"""Resources of every kernel in every configuration, compiled for GPUs that need not be there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ARCHES = (80, 90, 100)
GEMMS = {"expert_up_fwd", "expert_down_bwd", "grouped_gemm", "grouped_gram", "route_fwd"}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
COMMAND = (sys.executable, "-c", "from omnigene_fast.cli import main; main()", "kernels")


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "rows.json"
    result = command("--json", str(path), "--check")
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(path.read_text())


def offenders(rows, bad):
    return [f"sm_{row['arch']} {row['kernel']} {row['what']} {row['tile']}: {row}" for row in rows if bad(row)]


def triton_rows(rows):
    return [row for row in rows if row["language"] == "triton"]


def test_every_kernel_is_compiled_for_every_architecture(rows):
    kernels = GEMMS | {"dispatch_fwd", "combine_fwd", "expert_weights_bwd"}
    kernels |= {"route_token_fwd", "norm_scale_fwd", "topk_gate_fwd", "norm_scale_bwd", "topk_gate_bwd"}
    kernels |= {"dispatch_count", "dispatch_place"}
    compiled = {(row["arch"], row["kernel"]) for row in triton_rows(rows)}
    assert compiled == {(arch, kernel) for arch in ARCHES for kernel in kernels}


def test_every_kernel_of_the_package_is_compiled():
    """Whatever is decorated with triton.jit and launched is in the report."""
    from omnigene_fast.resources.launches import jobs

    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE)) == {job.function for job in jobs(90)}


def test_nothing_spills(rows):
    assert not offenders(rows, lambda row: row["stack"] or row["spill"])


def test_every_configuration_can_be_launched(rows):
    assert not offenders(rows, lambda row: row["shared"] > row["shared_limit"] or row["blocks"] < 1)


def test_half_gemms_use_tensor_cores(rows):
    """wgmma and tcgen05 take 64 rows; below, and before Hopper, the instruction is mma.sync."""
    wide = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    gemms = [row for row in triton_rows(rows) if row["kernel"] in GEMMS and "float32" not in row["what"]]
    gemms = [row for row in gemms if not row["what"].startswith("float16 fp32")]
    assert {row["kernel"] for row in gemms} == GEMMS
    for row in gemms:
        m = int(row["tile"].split("x")[0])
        assert (wide[row["arch"]] if m >= 64 else "HMMA") in row["tensor_cores"], row


def test_aligned_gemms_copy_sixteen_bytes_at_a_time(rows):
    """All operands, all stages of the pipeline; tiles 16 columns wide have fewer bytes than that, and so have those of
    weights in 8 bits with fewer than 16 bytes for each thread.

    A known shortfall: where mma.sync multiplies by weights in 8 bits whose rows are summed over (the backward's),
    Triton copies these in narrower pieces; there only the other operand is looked at.
    """
    gemms = [row for row in triton_rows(rows) if row["aligned"] and row["kernel"] in GEMMS - {"route_fwd"}]
    assert {row["kernel"] for row in gemms} == GEMMS - {"route_fwd"}
    assert not offenders(gemms, lambda row: not row["wide_copies"])
    assert not offenders(gemms, lambda row: "LDGSTS 128" not in row["load"])

    def enough(row):
        _, n, k = map(int, row["tile"].split("x"))
        return n >= 32 and ("weights " not in row["what"] or n * k >= 16 * 32 * row["warps"])

    wide = [row for row in gemms if enough(row)]
    narrow = [row for row in wide if re.match(r"d_.* weights ", row["what"]) and "HMMA" in row["tensor_cores"]]
    wide = [row for row in wide if row not in narrow]
    assert not offenders(wide, lambda row: row["wide_copies"] < row["pipeline_copies"])


def test_float32_is_never_multiplied_in_tf32(rows):
    assert not offenders(rows, lambda row: "float32" in row["what"] and row["tensor_cores"])


def test_offsets_are_multiplied_in_64_bits(rows):
    """Known bug: row * stride passes 2^31 near 95,000 tokens. Dispatch multiplies nothing larger than T * K."""
    assert not offenders(rows, lambda row: not row["kernel"].startswith("dispatch") and row["narrow_products"])


def test_a_trace_that_is_not_open_costs_nothing(rows):
    """A pointer that is None is no parameter, and nothing is stored through it: the other outputs are 4 or 8 bytes."""
    kernels = ("route_token_fwd", "route_fwd", "topk_gate_fwd")
    plain, traced = {}, {}
    for row in triton_rows(rows):
        if row["kernel"] in kernels and "all sizes 1" not in row["what"]:
            what, _, kind = row["what"].rpartition(", ") if "traced" in row["what"] else (row["what"], "", "")
            key = row["arch"], row["kernel"], what, row["tile"], row["tokens"]
            (traced if kind else plain).setdefault(key, []).append(row)
    kinds = {(row["arch"], row["kernel"], tuple(row["trace"])) for each in traced.values() for row in each}
    forms = [("*u8",), ("*u8", "*fp16", "*fp16"), ("*i16",), ("*i16", "*fp16", "*fp16")]
    assert kinds == set(product(ARCHES, kernels, forms))
    compared = [(row, plain[key][0]) for key, each in traced.items() if key in plain for row in each]
    assert {(row["arch"], row["kernel"]) for row, _ in compared} == set(product(ARCHES, kernels))
    for row, without in compared:
        assert row["parameters"] == without["parameters"] + len(row["trace"]), row
        assert row["narrow_stores"], row
        assert not without["trace"], without
        assert not without["narrow_stores"], without


def test_no_binary_is_bloated(rows):
    """Unrolled top-k rounds once made 0.9 MB of PTX; the largest kernel here, a GEMM before erf, stays far below."""
    assert not offenders(rows, lambda row: row["cubin_bytes"] > 400_000)


def test_the_committed_table_lists_what_can_be_launched(rows):
    """Not the numbers, which depend on the toolchain: kernels and configurations. `make kernels` writes it anew."""
    from omnigene_fast.resources.table import configurations, key_of

    committed = configurations((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"))
    languages = {row["language"] for row in rows}  # without NVRTC, no CUDA C++
    committed = {key for key in committed if key[1] in languages}
    launched = {key_of(row) for row in rows}
    assert len(launched) == len(rows), "two configurations of one name: the table cannot tell them apart"
    missing, stale = sorted(launched - committed), sorted(committed - launched)
    assert not missing, f"{len(missing)} are not in docs/kernels.md, run make kernels: {missing[:3]}"
    assert not stale, f"{len(stale)} in docs/kernels.md are launched by nothing, run make kernels: {stale[:3]}"
