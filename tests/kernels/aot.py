"""Compiles the forward kernels for GPUs that need not be there, and reports the resources of each.

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

from omnigene_fast.kernels import tiles
from omnigene_fast.kernels.combine import launch_combine_fwd
from omnigene_fast.kernels.dispatch import launch_dispatch_fwd
from omnigene_fast.kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
from omnigene_fast.kernels.gate import launch_route_fwd, launch_topk_gate_fwd

ARCHES = (80, 90, 100)
WORKERS = 2
E, K, H, I = 128, 8, 2816, 704  # noqa: E741
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
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
            if fn.params[position].is_constexpr:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], divisible = POINTERS[value.dtype], self.context.get("aligned", True)
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
    for job in recorder.jobs:
        job["arch"] = arch
    return recorder.jobs


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _record_experts(recorder: Recorder, arch: int) -> None:
    T = 1024
    index = _meta(T, K, dtype=torch.int64)

    def experts(dtype, aligned, choice, activation="gelu_tanh", h=H, i=I):
        block_m = choice.up.block_m
        h, i = (h, i) if aligned else (h - 1, i - 1)
        recorder.context = {
            "what": f"{str(dtype)[6:]} {activation}{'' if aligned else ' odd'}{'' if h in (H, H - 1) else ' uneven'}",
            "aligned": aligned,
            "gemm_rows": block_m if dtype != torch.float32 else 0,
        }
        # The dispatch itself is recorded below: here it only supplies its arrays.
        before = len(recorder.jobs)
        dispatch = launch_dispatch_fwd(index, E, block_m)
        del recorder.jobs[before:]
        hidden = launch_expert_up_fwd(
            _meta(T, h, dtype=dtype), _meta(E, 2 * i, h, dtype=dtype), dispatch, activation, choice.up
        )
        launch_expert_down_fwd(hidden, _meta(E, h, i, dtype=dtype), dispatch, choice.down)

    configs = tiles.all_configs(arch)
    for config in configs:
        experts(*config)
        if config[2].up.block_m == 128:
            experts(*config, h=H + 16, i=I + 16)
    widest = max((choice for _, _, choice in configs), key=lambda choice: (choice.up.block_m, choice.up.block_n))
    experts(torch.bfloat16, True, widest, activation="gelu")
    experts(torch.bfloat16, True, widest, activation="silu")
    experts(torch.float16, True, widest)

    for tokens, block_m in ((16, 16), (T, 128)):
        recorder.context = {"what": f"T={tokens}"}
        launch_dispatch_fwd(_meta(tokens, K, dtype=torch.int64), E, block_m)
    for dtype, top_k in ((torch.bfloat16, K), (torch.float32, 32)):
        recorder.context = {"what": f"{str(dtype)[6:]} K={top_k}"}
        launch_combine_fwd(
            _meta(T * top_k, H, dtype=dtype), _meta(T * top_k, dtype=torch.int32), _meta(T, top_k, dtype=torch.float32)
        )


def _record_ones(recorder: Recorder, arch: int) -> None:
    """Every size is 1, which Triton turns into a constant."""
    recorder.context = {"what": "all sizes 1", "aligned": False}
    choice = tiles.expert_tiles(1, 1, torch.bfloat16, arch, aligned=False)
    dispatch = launch_dispatch_fwd(_meta(1, 1, dtype=torch.int64), 1, choice.up.block_m)
    h = launch_expert_up_fwd(_meta(1, 1), _meta(1, 2, 1), dispatch, "gelu_tanh", choice.up)
    y = launch_expert_down_fwd(h, _meta(1, 1, 1), dispatch, choice.down)
    launch_combine_fwd(y, dispatch.position, _meta(1, 1))
    launch_route_fwd(_meta(1, 1), _meta(1, 1), _meta(1), _meta(1), 1, 1e-6, "hf", arch)
    launch_topk_gate_fwd(_meta(1, 1), _meta(1), 1)


def _record_router(recorder: Recorder, arch: int) -> None:
    def route(dtype, numerics, tokens, tile=None, experts=E, h=H):
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
        )

    for dtype, numerics, tile in tiles.all_route_tiles(E, arch):
        recorder.context = {
            "what": f"{str(dtype)[6:]} {numerics} t{tile.block_t}",
            "gemm_rows": tile.block_t if dtype == torch.bfloat16 else 0,
        }
        route(dtype, numerics, 32, tile)
    for experts in (200, 257):
        recorder.context = {"what": f"bfloat16 hf E={experts} odd", "aligned": False}
        route(torch.bfloat16, "hf", 32, experts=experts, h=H - 1)
    recorder.context = {"what": "bfloat16 hf T=1024"}
    route(torch.bfloat16, "hf", 1024)
    recorder.context = {"what": "float16 fp32 T=1024"}
    route(torch.float16, "fp32", 1024)
    recorder.context = {"what": "bfloat16 E=257 K=8"}
    launch_topk_gate_fwd(_meta(512, 257), _meta(257), K)


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
    constants = job["constants"]
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
        "gemm_rows": job.get("gemm_rows", 0),
        "wide_copies": len(re.findall(r"cp\.async\.\w+\.shared\.global[^\n]* 0x10,", ptx)),
        "narrow_products": len(re.findall(r"arith\.muli .*: tensor<[0-9x]*xi32>", compiled.asm["ttir"])),
        "cubin_bytes": len(cubin),
    }


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
    columns = [name for name in rows[0] if name not in ("aligned", "gemm_rows", "shared_limit")]
    widths = [max(len(str(row[name])) for row in [*rows, {name: name}]) for name in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[name]).ljust(width) for name, width in zip(columns, widths, strict=True)))


if __name__ == "__main__":
    main()
