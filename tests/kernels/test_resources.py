"""The resource report itself: it refuses what it must refuse, counts what ptxas counts, and is short when it is asked
twice."""

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from omnigene_fast.cli import main

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from omnigene_fast.resources import build, experts, occupancy, predict, recorder, report, sass, table

    @triton.jit
    def _product_kernel(x_ptr, w_ptr, out_ptr, K, WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """out = x @ w, [M, K] and [K, N], in steps of 64; WIDEN: in float32, as a careless rewrite would."""
        m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, K, 64):
            x = tl.load(x_ptr + m[:, None] * K + start + k[None, :])
            w = tl.load(w_ptr + (start + k)[:, None] * N + n[None, :])
            if WIDEN:
                total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(x, w, total)
        tl.store(out_ptr + m[:, None] * N + n[None, :], total)

    @triton.jit
    def _described_kernel(weights, x_ptr, out_ptr, scale, N: tl.constexpr, step, flag):
        """out = x @ weights[0]^T * scale, the weights by descriptor."""
        m, n, k = tl.arange(0, 64), tl.arange(0, N), tl.arange(0, 64)
        total = tl.zeros([64, N], tl.float32)
        for start in range(0, 256, 64):
            x = tl.load(x_ptr + m[:, None] * 256 + start + k[None, :])
            total = tl.dot(x, weights.load([0, 0, start]).reshape(N, 64).T, total)
        if flag:
            total *= scale
        tl.store(out_ptr + m[:, None] * N + n[None, :] * step, total)


def product(arch=90, m=128, n=64, widen=False, **options):
    with recorder.recording(arch) as recorded:
        recorded.tell("product, bfloat16", 1)
        x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, 512), (512, n)))
        out = torch.empty((m, n), device="meta")
        _product_kernel[(1,)](x, w, out, 512, WIDEN=widen, M=m, N=n, **({"num_warps": 4, "num_stages": 3} | options))
    (job,) = recorded.unique()
    return job


def judged(monkeypatch, job):
    monkeypatch.setitem(predict._FLOPS, job.function, lambda job: 1)
    (built,) = build.build([job])
    row = report.row(job, built)
    return row, report.offences([row])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_sound_product_is_no_offence(monkeypatch, arch):
    row, found = judged(monkeypatch, product(arch))
    assert not found
    assert set(row.built.tensor_cores) == {{80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]}
    assert row.built.load == "LDGSTS 128"


def test_a_spill_is_refused_and_counted_as_ptxas_counts_it(monkeypatch, tmp_path):
    job = product(80, n=128, maxnreg=64)
    row, found = judged(monkeypatch, job)
    assert len(found) == 1
    assert "spills" in found[0]
    (tmp_path / "kernel.ptx").write_text(build.compile_job(job)[0].asm["ptx"])
    command = [sass.tool("ptxas"), "-v", "-arch=sm_80", "kernel.ptx", "-o", "kernel.cubin"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack.* (\d+) bytes spill st.* (\d+) bytes spill lo", log).groups()
    )
    assert stores > 0
    assert row.built.stack == stack
    assert row.built.spill == stores + loads
    assert row.built.registers == int(re.search(r"Used (\d+) registers", log)[1])


def test_a_gemm_without_tensor_cores_is_refused(monkeypatch):
    row, found = judged(monkeypatch, product(widen=True))
    assert not row.built.tensor_cores
    assert any("without the tensor cores: expected HGMMA, got none" in sentence for sentence in found)


def test_a_wide_gemm_on_the_narrow_instruction_is_refused(monkeypatch):
    """wgmma is issued by four warps: with two, Triton falls back to mma.sync at half the rate."""
    row, found = judged(monkeypatch, product(num_warps=2, n=16))
    assert set(row.built.tensor_cores) == {"HMMA"}
    assert "expected HGMMA, got HMMA" in found[0]
    assert not judged(monkeypatch, product(m=32, n=16, num_warps=2))[1]


def test_what_cannot_launch_is_refused(monkeypatch):
    row, found = judged(monkeypatch, product(n=256, num_stages=8, num_warps=8))
    assert row.blocks == 0
    assert len(found) == 1
    assert "shared memory" in found[0]
    full = replace(row, blocks=0, built=replace(row.built, shared=0, registers=168, threads=512))
    assert "168 registers each do not fit" in report.offences([full])[0]
    assert occupancy.blocks_per_multiprocessor(90, 168, 512, 0) == 0


def test_products_that_no_one_counted_are_refused():
    job = product()
    row = report.row(job, build.build([job])[0])
    assert row.prediction is None
    assert "no count of FLOPs" in report.offences([row])[0]


def test_descriptors_and_other_arguments_are_recorded_as_triton_specialises_them():
    descriptors = pytest.importorskip("triton.tools.tensor_descriptor")
    with recorder.recording(90) as recorded:
        recorded.tell("described", 1)
        weights = torch.empty((4, 64, 256), dtype=torch.bfloat16, device="meta")
        x, out = (torch.empty((64, n), dtype=torch.bfloat16, device="meta") for n in (256, 64))
        described = descriptors.TensorDescriptor.from_tensor(weights, [1, 64, 64])
        _described_kernel[(1, 2)](described, x, out, 0.5, N=64, step=1, flag=True, num_warps=4)
    (job,) = recorded.unique()
    kinds = {
        "weights": "tensordesc<bf16[1,64,64]>",
        "x_ptr": "*bf16",
        "scale": "fp32",
        "step": "constexpr",
        "flag": "u1",
    }
    assert kinds.items() <= job.signature.items()
    assert job.operands["weights"] == recorder.Operand((4, 64, 256), 2, descriptor=True)
    assert job.programs == 2
    (built,) = build.build([job])
    assert built.load.startswith("TMA")
    assert "HGMMA" in built.tensor_cores


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "columns", "blocks"),
    [
        (80, 32, 256, 0, 0, 8),  # warps: 64 / 8
        (80, 32, 64, 0, 0, 32),  # blocks
        (86, 32, 64, 0, 0, 16),
        (80, 128, 256, 0, 0, 2),  # registers: 16 warps of 4096
        (80, 129, 256, 0, 0, 1),  # 136 per thread: 15 warps of 4352 by the sum, 12 by partition
        (90, 168, 128, 0, 0, 3),  # three warps of 5376 in each partition of 16384
        (90, 255, 128, 0, 0, 2),
        (90, 255, 32, 0, 0, 8),
        (90, 168, 384, 0, 0, 1),  # three warps of 5376 in each partition, all of one block
        (90, 168, 512, 0, 0, 0),
        (90, 64, 128, 98_304, 0, 2),  # 228 KB / 97 KB
        (80, 64, 128, 98_304, 0, 1),
        (90, 64, 128, 232_448, 0, 1),  # all that a block may have
        (90, 64, 128, 232_449, 0, 0),
        (100, 64, 128, 0, 256, 2),  # tensor memory
        (100, 64, 128, 0, 512, 1),
        (90, 128, 1024, 0, 0, 0),  # registers of a block
    ],
)
def test_blocks_per_multiprocessor(arch, registers, threads, shared, columns, blocks):
    assert occupancy.blocks_per_multiprocessor(arch, registers, threads, shared, columns) == blocks


def test_limits_agree_with_those_that_tiles_are_chosen_by():
    from omnigene_fast.kernels import tiles

    for arch, limits in occupancy.MULTIPROCESSORS.items():
        assert limits.shared_block == tiles.shared_limit(arch), arch


def test_widths_of_loads_are_read_from_the_modifiers():
    def load(*names):
        return sass.Code(Counter(names)).load()

    assert load("LDG.E", "LDG.E.U16.CONSTANT") == "LDG 32"
    assert load("LDG.E.U16") == "LDG 16"
    assert load("LDG.E.64", "LDGSTS.E.BYPASS.LTC128B.64") == "LDGSTS 64"
    assert load("LDGSTS.E.BYPASS.LTC128B.128", "UTMALDG.3D") == "TMA + LDGSTS 128"
    assert load("STG.E.128") == ""


def test_predictions_against_the_design_s_floors():
    """Gemma-4's forward: 95.16 MFLOP per token; 1522 MB of weights per layer; 52 experts hit by 8 tokens."""
    found = {job.what: job for job in report.find([90]) if job.tokens == 4096}
    up, down = found["up, bfloat16"], found["down, bfloat16"]
    flops = sum(predict.predict(job, 1, True).flops for job in (up, down))
    assert flops == pytest.approx(4096 * 95.16e6, rel=1e-3)
    assert up.operands["gate_up_ptr"].bytes + down.operands["weight_ptr"].bytes == pytest.approx(1522e6, rel=1e-3)
    assert experts.experts_hit(8) == pytest.approx(52, abs=1)
    # compute bound or not is decided by the data sheet's ridge; each matrix's bytes count once
    predicted = predict.predict(down, 1, True)
    rows = 4096 * 8
    assert predicted.bytes == pytest.approx(2 * (128 * 704 * 2816 + rows * 704 + rows * 2816), rel=1e-3)
    assert predicted.floor_us == pytest.approx(1e6 * predicted.bytes / 3.35e12)
    assert predicted.programs == rows // down.constants["BLOCK_M"] * -(-2816 // down.constants["BLOCK_N"])


def test_few_tokens_read_few_experts():
    few = next(job for job in report.find([90], ["grouped_gemm"]) if job.what == "down, bfloat16" and job.tokens == 256)
    spared = predict.predict(few, 1, True).bytes - predict.predict(replace(few, tokens=1), 1, True).bytes
    assert spared == pytest.approx(2 * 704 * 2816 * (experts.experts_hit(256) - 8))


def test_markdown_is_read_back(monkeypatch):
    monkeypatch.setitem(predict._FLOPS, "_product_kernel", lambda job: 1)
    jobs = [product(80), product(90)]
    rows = [report.row(job, built) for job, built in zip(jobs, build.build_all(jobs), strict=True)]
    assert table.configurations(table.markdown(rows)) == {table.key_of(row.flat()) for row in rows}
    assert "HGMMA" in table.console(rows)


def test_results_are_kept(monkeypatch, tmp_path):
    """The second time nothing is compiled; a broken file and another specialisation are compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    job = product(80, m=16, n=16)
    first = build.build_all([job])
    monkeypatch.setattr(build, "get_context", None)  # no processes
    assert build.build_all([job]) == first
    for other in (replace(job, options=job.options | {"num_warps": 8}), replace(job, arch=90)):
        with pytest.raises(TypeError):
            build.build_all([other])
    (kept,) = build.cache_folder("resources").glob("*.json")
    kept.write_text(kept.read_text()[:-9])
    with pytest.raises(TypeError):
        build.build_all([job])


def run(*arguments):
    return CliRunner().invoke(main, ["kernels", *arguments])


def test_command_prints_a_table():
    result = run("--arch", "80", "--kernel", "weights_bwd")
    assert result.exit_code == 0, result.output
    assert "expert_weights_bwd" in result.output
    assert "floor µs" in result.output


def test_command_fails_on_an_offence(monkeypatch):
    job = report.find([80], ["norm_scale_bwd"])[0]
    monkeypatch.setattr(report, "find", lambda arches, kernels: [replace(job, options=job.options | {"maxnreg": 24})])
    result = run("--check")
    assert result.exit_code == 1
    assert "spills" in result.output
    assert "1 offences in 1 configurations" in result.output


def test_command_refuses_in_one_sentence(monkeypatch):
    assert "expected part of one of combine_fwd" in run("--kernel", "nonsense").output
    assert "--arch: expected 80, 86" in run("--arch", "70").output
    assert "--arch: expected comma-separated integers" in run("--arch", "sm_90").output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run()
    assert result.exit_code == 1
    assert "TRITON_INTERPRET is set" in result.output
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 1
    assert "pip install 'omnigene-fast[triton]'" in result.output
