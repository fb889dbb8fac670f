"""Compiles the kernels for GPUs that need not be there, and reports the resources of each.

    python tests/kernels/aot.py [--json] [--arch 80 90 100]

The launchers themselves are run on meta tensors at Gemma-4's sizes with `JITFunction.run` replaced by a recorder, so
what is compiled is what a GPU would be asked to run: every configuration of `all_configs`, aligned and odd shapes,
every dtype. Needs the real compiler: TRITON_INTERPRET must be unset. Compiled binaries live in Triton's own cache.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from omnigene_fast.backends import TraceBuffers
from omnigene_fast.kernels import tiles
from omnigene_fast.kernels.combine import launch_combine_fwd
from omnigene_fast.kernels.dispatch import launch_dispatch_fwd
from omnigene_fast.kernels.expert_backward import launch_expert_down_bwd
from omnigene_fast.kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
from omnigene_fast.kernels.gate import launch_route_fwd, launch_topk_gate_fwd
from omnigene_fast.kernels.gate_backward import launch_route_bwd, launch_topk_gate_bwd
from omnigene_fast.kernels.grouped_gemm import launch_grouped_gemm, launch_grouped_gram
from omnigene_fast.kernels.lora import (
    launch_lora_bwd,
    launch_lora_fwd,
    launch_lora_lhs_bwd,
    launch_lora_rhs_bwd,
    pad_factors,
)

ARCHES = (80, 90, 100)
WORKERS = 2
E, K, H, I = 128, 8, 2816, 704  # noqa: E741
ROWS = 8192
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORE = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


class Recorder:
    """Stands in for `JITFunction.run` and keeps what would have been launched."""

    def __init__(self):
        self.jobs = []
        self.context = {}

    def __call__(self, fn, *args, grid, warmup=False, num_warps=4, num_stages=3, **kwargs):
        bound = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(fn.arg_names):
            value = bound[name]
            divisible = False
            if fn.params[position].is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], divisible = POINTERS[value.dtype], self.context.get("aligned", True)
                divisible = divisible and not fn.params[position].do_not_specialize_on_alignment
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name], divisible = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
            if divisible:
                attributes[position] = 16
        self.jobs.append(
            {
                **self.context,
                "module": fn.fn.__module__,
                "kernel": fn.fn.__name__,
                "signature": signature,
                "constants": constants,
                "attributes": attributes,
                "options": {"num_warps": num_warps, "num_stages": num_stages},
            }
        )


def record(arch: int) -> list[dict]:
    """Every launch worth compiling for `arch`."""
    recorder = Recorder()
    original = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: recorder(self, *args, **kwargs)
    try:
        _record_experts(recorder, arch)
        _record_router(recorder, arch)
        if arch == ARCHES[0]:
            _record_ones(recorder, arch)
    finally:
        JITFunction.run = original
    # Launches that differ in no more than what they are called for are compiled once.
    unique = {}
    for job in recorder.jobs:
        compiled = {name: job[name] for name in ("kernel", "signature", "constants", "attributes", "options")}
        unique.setdefault(repr(compiled), job | {"arch": arch})
    return list(unique.values())


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _trace(tokens: int, experts: int, only_ids: bool = False, top_k: int = K) -> TraceBuffers:
    ids = _meta(tokens, top_k, dtype=torch.uint8 if experts <= 255 else torch.int16)
    if only_ids:
        return TraceBuffers(ids)
    return TraceBuffers(ids, _meta(tokens, top_k, dtype=torch.float16), _meta(tokens, 3, dtype=torch.float16))


class Experts:
    """Operands of Gemma-4's experts on the meta device, and every launch over them; odd sizes unless `aligned`."""

    def __init__(self, recorder, dtype, aligned, choice, activation="gelu_tanh", h=H, i=I):
        h, i = (h, i) if aligned else (h - 1, i - 1)
        self.dtype, self.choice, self.activation = dtype, choice, activation
        self.hidden, self.weights = _meta(ROWS // K, h, dtype=dtype), _meta(ROWS // K, K, dtype=torch.float32)
        self.gate_up, self.down = _meta(E, 2 * i, h, dtype=dtype), _meta(E, h, i, dtype=dtype)
        self.pre, self.h = _meta(ROWS, 2 * i, dtype=dtype), _meta(ROWS, i, dtype=dtype)
        uneven = "" if h in (H, H - 1) else " uneven"
        self.what = f"{str(dtype)[6:]} {activation}{'' if aligned else ' odd'}{uneven}"
        self.recorder, self.aligned = recorder, aligned
        self.tell("")
        # The dispatch itself is recorded elsewhere: here it only supplies its arrays.
        before = len(recorder.jobs)
        self.dispatch = launch_dispatch_fwd(_meta(ROWS // K, K, dtype=torch.int64), E, choice.block_m)
        del recorder.jobs[before:]

    def tell(self, what):
        half = self.dtype != torch.float32
        self.recorder.context = {"what": self.what + what, "aligned": self.aligned, "half": half}

    def forward(self, training=False, low=(None, None)):
        dispatch, choice = self.dispatch, self.choice
        self.tell(" training" if training else "")
        launch_expert_up_fwd(
            self.hidden,
            self.gate_up,
            dispatch,
            self.activation,
            choice.up,
            low_rank=low[0],
            want_preactivation=training,
        )
        launch_expert_down_fwd(self.h, self.down, dispatch, choice.down, low_rank=low[1])

    def backward(self, low=(None, None), want_weighted_h=True):
        dispatch, choice = self.dispatch, self.choice
        self.tell("")
        launch_expert_down_bwd(
            self.hidden,
            self.down,
            self.pre,
            self.weights,
            dispatch,
            self.activation,
            choice.down_bwd,
            low_rank=low[0],
            want_weighted_h=want_weighted_h,
        )
        launch_grouped_gemm(self.pre, self.gate_up, dispatch, choice.down, low_rank=low[1])

    def weights_backward(self):
        gram = self.choice.gram
        launch_grouped_gram(self.hidden, self.h, self.down, self.dispatch, gram, gather_left=True)
        launch_grouped_gram(self.pre, self.hidden, self.gate_up, self.dispatch, gram, gather_right=True)

    def lora(self, rank):
        dispatch, choice = self.dispatch, self.choice
        self.what += f" r={rank}"
        self.tell("")

        def factors(weight):
            _, out, columns = weight.shape
            return pad_factors(_meta(E, out, rank, dtype=self.dtype), _meta(E, rank, columns, dtype=self.dtype))

        up, down = factors(self.gate_up), factors(self.down)
        x_rhs = launch_lora_fwd(self.hidden, up, dispatch, choice, gather=True)
        h_rhs = launch_lora_fwd(self.h, down, dispatch, choice)
        g_lhs = launch_lora_bwd(self.hidden, down, dispatch, choice, gather=True)
        d_lhs = launch_lora_bwd(self.pre, up, dispatch, choice)
        self.forward(training=True, low=(x_rhs, h_rhs))
        self.backward(low=(g_lhs, d_lhs))
        launch_lora_lhs_bwd(self.pre, x_rhs.low, up, dispatch, choice)
        launch_lora_lhs_bwd(self.hidden, h_rhs.low, down, dispatch, choice, gather=True)
        launch_lora_rhs_bwd(self.hidden, d_lhs.low, up, dispatch, choice, gather=True)
        launch_lora_rhs_bwd(self.h, g_lhs.low, down, dispatch, choice)


def _record_experts(recorder: Recorder, arch: int) -> None:
    configs = tiles.all_configs(arch)
    for dtype, aligned, lora, choice in configs:
        if lora:
            Experts(recorder, dtype, aligned, choice).lora(16)
            if dtype == torch.bfloat16 and aligned and choice.block_m >= 64:
                Experts(recorder, dtype, aligned, choice).lora(64)
            continue
        experts = Experts(recorder, dtype, aligned, choice)
        experts.forward()
        experts.forward(training=True)
        experts.backward()
        experts.weights_backward()
        if choice.block_m == 128:
            experts.backward(want_weighted_h=False)
            uneven = Experts(recorder, dtype, aligned, choice, h=H + 16, i=I + 16)
            uneven.forward()
            uneven.backward()
    widest = max((choice for *_, choice in configs), key=lambda choice: (choice.block_m, choice.up.block_n))
    for dtype, activation in ((torch.bfloat16, "gelu"), (torch.bfloat16, "silu"), (torch.float16, "gelu_tanh")):
        experts = Experts(recorder, dtype, True, widest, activation)
        experts.forward(training=True)
        experts.backward()
    Experts(recorder, torch.bfloat16, True, widest).weights_backward()

    for tokens, block_m in ((16, 16), (ROWS // K, 128)):
        recorder.context = {"what": f"T={tokens}"}
        launch_dispatch_fwd(_meta(tokens, K, dtype=torch.int64), E, block_m)
    for dtype, top_k, weighted in ((torch.bfloat16, K, True), (torch.bfloat16, K, False), (torch.float32, 32, True)):
        recorder.context = {"what": f"{str(dtype)[6:]} K={top_k}{'' if weighted else ' unweighted'}"}
        rows = 256 * top_k
        weights = _meta(256, top_k, dtype=torch.float32) if weighted else None
        launch_combine_fwd(_meta(rows, H, dtype=dtype), _meta(rows, dtype=torch.int32), weights, top_k)


def _record_ones(recorder: Recorder, arch: int) -> None:
    """Every size is 1, which Triton turns into a constant."""
    recorder.context = {"what": "all sizes 1", "aligned": False}
    choice = tiles.expert_tiles(1, 1, torch.bfloat16, arch, aligned=False)
    dispatch = launch_dispatch_fwd(_meta(1, 1, dtype=torch.int64), 1, choice.up.block_m)
    one, three = _meta(1, 1), _meta(1, 1, 1)
    h, pre = launch_expert_up_fwd(one, _meta(1, 2, 1), dispatch, "gelu_tanh", choice.up, want_preactivation=True)
    y = launch_expert_down_fwd(h, three, dispatch, choice.down)
    launch_combine_fwd(y, dispatch.position, one, 1)
    launch_expert_down_bwd(one, three, pre, one, dispatch, "gelu_tanh", choice.down_bwd, want_weighted_h=True)
    launch_grouped_gemm(pre, _meta(1, 2, 1), dispatch, choice.down)
    launch_grouped_gram(one, one, three, dispatch, choice.gram, gather_left=True)
    factors = pad_factors(three, three)
    low = launch_lora_fwd(one, factors, dispatch, choice, gather=True).low
    launch_lora_bwd(one, factors, dispatch, choice)
    launch_lora_lhs_bwd(one, low, factors, dispatch, choice)
    launch_lora_rhs_bwd(one, low, factors, dispatch, choice, gather=True)
    launch_route_fwd(one, one, _meta(1), _meta(1), 1, 1e-6, "hf", arch)
    launch_topk_gate_fwd(one, _meta(1), 1)
    launch_topk_gate_fwd(one, _meta(1), 1, _trace(1, 1, top_k=1))
    wide = _meta(1, 1, dtype=torch.float32)
    launch_topk_gate_bwd(wide, wide, wide, _meta(1, 1, dtype=torch.int64), _meta(1), True)
    launch_route_bwd(wide, one, one, _meta(1), 1e-6, (True, True, True))


def _record_router(recorder: Recorder, arch: int) -> None:
    def route(dtype, numerics, tokens, tile=None, experts=E, h=H, trace=None):
        launch_route_fwd(
            _meta(tokens, h, dtype=dtype),
            _meta(experts, h, dtype=dtype),
            _meta(h, dtype=dtype),
            _meta(experts, dtype=dtype),
            K,
            1e-6,
            numerics,
            arch,
            tile,
            trace,
        )

    for dtype, numerics, tile in tiles.all_route_tiles(E, arch):
        recorder.context = {
            "what": f"{str(dtype)[6:]} {numerics} t{tile.block_t}",
            "half": dtype == torch.bfloat16,
        }
        route(dtype, numerics, 32, tile)
        recorder.context["what"] += " traced"
        route(dtype, numerics, 32, tile, trace=_trace(32, E))
    for experts in (200, 257):
        recorder.context = {"what": f"bfloat16 hf E={experts} odd", "aligned": False}
        route(torch.bfloat16, "hf", 32, experts=experts, h=H - 1)
        recorder.context["what"] += " traced"
        route(torch.bfloat16, "hf", 32, experts=experts, h=H - 1, trace=_trace(32, experts))
    for experts in (E, 257):
        recorder.context = {"what": f"bfloat16 hf E={experts} traced ids"}
        route(torch.bfloat16, "hf", 32, experts=experts, trace=_trace(32, experts, only_ids=True))
    recorder.context = {"what": "bfloat16 hf T=1024"}
    route(torch.bfloat16, "hf", 1024)
    recorder.context = {"what": "float16 fp32 T=1024"}
    route(torch.float16, "fp32", 1024)
    for experts in (E, 257):
        logits = _meta(512, experts), _meta(experts), K
        recorder.context = {"what": f"bfloat16 E={experts} K=8"}
        launch_topk_gate_fwd(*logits)
        recorder.context["what"] += " traced"
        launch_topk_gate_fwd(*logits, _trace(512, experts))
        recorder.context = {"what": f"bfloat16 E={experts} K=8 traced ids"}
        launch_topk_gate_fwd(*logits, _trace(512, experts, only_ids=True))
    for experts, both in ((E, True), (E, False), (257, True)):
        recorder.context = {"what": f"E={experts}{' with probabilities, scale' if both else ''}"}
        grad, wide = (_meta(512, n, dtype=torch.float32) for n in (K, experts))
        index = _meta(512, K, dtype=torch.int64)
        launch_topk_gate_bwd(wide if both else None, grad, wide, index, _meta(experts), both)
    for dtype in (torch.bfloat16, torch.float32):
        recorder.context = {"what": str(dtype)[6:]}
        router = (_meta(512, H, dtype=dtype), _meta(E, H, dtype=dtype), _meta(H, dtype=dtype))
        launch_route_bwd(_meta(512, E, dtype=torch.float32), *router, 1e-6, (True, True, True))


def build(job: dict) -> dict:
    """Compiles one recorded launch and reads its resources."""
    fn = getattr(importlib.import_module(job["module"]), job["kernel"])
    source = ASTSource(
        fn,
        job["signature"],
        job["constants"],
        {(position,): [["tt.divisibility", size]] for position, size in job["attributes"].items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    constants, signature = job["constants"], job["signature"]
    blocks = "x".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in constants)
    return {
        "arch": job["arch"],
        "kernel": job["kernel"].strip("_").removesuffix("_kernel"),
        "what": job["what"],
        "blocks": blocks,
        "warps": job["options"]["num_warps"],
        "stages": job["options"]["num_stages"],
        "registers": fields["REG"],
        "stack": fields["STACK"],
        "local": fields["LOCAL"],
        "shared": compiled.metadata.shared,
        "shared_limit": tiles.shared_limit(job["arch"]),
        "tensor_core": next((name for name, text in TENSOR_CORE.items() if text in ptx), ""),
        "aligned": job.get("aligned", True),
        "gemm_rows": constants.get("BLOCK_M", constants.get("BLOCK_T", 0)) if job.get("half") else 0,
        "pipeline_copies": _pipeline_copies(job),
        "wide_copies": len(re.findall(r"cp\.async\.\w+\.shared\.global[^\n]* 0x10,", ptx)),
        # Triton appends two pointers of its own, to scratch memory.
        "parameters": re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)[1].count(".param ") - 2,
        "trace": [kind for name, kind in signature.items() if name.startswith("trace_") and kind != "constexpr"],
        "narrow_stores": len(re.findall(r"st\.global\.\w*(?:b8|b16)\b", ptx)),
        "narrow_products": len(re.findall(r"arith\.muli .*: tensor<[0-9x]*xi32>", compiled.asm["ttir"])),
        "cubin_bytes": len(cubin),
    }


def _pipeline_copies(job: dict) -> float:
    """16-byte copies per thread that fill the pipeline of a GEMM once, if every operand is copied so."""
    constants, options = job["constants"], job["options"]
    if "BLOCK_M" not in constants or "BLOCK_N" not in constants:
        return 0
    operands = 2 if job["kernel"] == "_expert_up_fwd_kernel" else 1
    columns = constants["BLOCK_M"] + operands * constants["BLOCK_N"]
    itemsize = 2 if job.get("half") else 4
    stages = options["num_stages"]
    if constants.get("GATHER_LEFT") or constants.get("GATHER_RIGHT"):
        stages = (stages + 1) // 2  # the other half of the depth waits for the rows' numbers
    return stages * columns * constants["BLOCK_K"] * itemsize / (16 * 32 * options["num_warps"])


def compile_all(arches: tuple[int, ...] = ARCHES) -> list[dict]:
    """Resource rows of every recorded launch, compiled by two processes."""
    jobs = [job for arch in arches for job in record(arch)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(build, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHES, help="compute capabilities, as 80 90 100")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing.")
    rows = compile_all(tuple(arguments.arch))
    if arguments.json:
        print(json.dumps(rows))
        return
    hidden = ("aligned", "gemm_rows", "shared_limit", "pipeline_copies", "parameters", "trace", "narrow_stores")
    columns = [name for name in rows[0] if name not in hidden]
    widths = [max(len(str(row[name])) for row in [*rows, {name: name}]) for name in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[name]).ljust(width) for name, width in zip(columns, widths, strict=True)))


if __name__ == "__main__":
    main()
