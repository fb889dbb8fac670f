"""Every launch worth compiling: what the launchers do for every configuration, dtype, alignment and option.

Every tile of the tables is compiled. Left out, for the sake of the time that the tests take:

- float16 but for the widest tiles of experts, the narrowest of routers: bfloat16's code but for the conversions
- products and gradients of low-rank factors in float32 and of rows that are not aligned: the kernels of the down
  projection and of the weights' gradients, which are compiled, with a quarter of the columns
- weights in 8 bits: float32 rows that are not aligned; e4m3 with low-rank updates, with float32 and with rows that are
  not aligned, where int8 has the same tile and a conversion alike
- the traced router but in bfloat16: what is traced follows the logits, which are float32 in every dtype
"""

import torch

from ..backends import TraceBuffers
from ..kernels import tiles
from ..kernels.gate import launch_route_fwd, launch_topk_gate_fwd
from ..kernels.gate_backward import launch_route_bwd, launch_topk_gate_bwd
from .experts import E, H, K, meta, record_around_experts, record_experts, record_experts_of_ones, record_low_bits
from .recorder import Job, Recorder, recording

ARCHES = (80, 90, 100)
_EPS = 1e-6
_TOKENS = {1: 16, 16: 1024, 64: 4096, 128: 16384}  # T that a router's tile of so many tokens is launched for


def jobs(arch: int) -> list[Job]:
    """What is compiled for `arch`; each job once."""
    with recording(arch) as recorder:
        record_experts(recorder)
        record_low_bits(recorder)
        record_around_experts(recorder)
        _record_router(recorder)
        if arch == ARCHES[0]:
            record_experts_of_ones(recorder)
            _record_router_of_ones(recorder)
    return recorder.unique()


def _trace(tokens: int, experts: int, only_ids: bool = False, top_k: int = K) -> TraceBuffers:
    ids = meta(tokens, top_k, dtype=torch.uint8 if experts <= 254 else torch.int16)
    if only_ids:
        return TraceBuffers(ids)
    return TraceBuffers(ids, meta(tokens, top_k, dtype=torch.float16), meta(tokens, 3, dtype=torch.float16))


def _record_router(recorder: Recorder) -> None:
    arch = recorder.arch

    def route(
        what: str,
        dtype: torch.dtype = torch.bfloat16,
        numerics: str = "hf",
        tokens: int = 1024,
        tile: tiles.RouteTile | None = None,
        experts: int = E,
        aligned: bool = True,
        trace: TraceBuffers | None = None,
    ) -> None:
        h = H if aligned else H - 1
        recorder.tell(f"{str(dtype)[6:]} {numerics}{what}", tokens, aligned)
        launch_route_fwd(
            meta(tokens, h, dtype=dtype),
            meta(experts, h, dtype=dtype),
            meta(h, dtype=dtype),
            meta(experts, dtype=dtype),
            K,
            _EPS,
            numerics,
            arch,
            tile,
            trace,
        )

    for dtype, numerics, tile in tiles.all_route_tiles(E, arch):
        if dtype == torch.float16 and numerics == "hf" and tile.block_t > 16:
            continue
        tokens = _TOKENS[tile.block_t]
        form = "" if tile.select else ", no choice"
        route(form, dtype, numerics, tokens, tile)
        if dtype == torch.bfloat16 and tile.select:
            route(", traced", dtype, numerics, tokens, tile, trace=_trace(tokens, E))
    for tokens in (1, 256):
        for experts in (200, 257):
            route(f" E={experts} odd", tokens=tokens, experts=experts, aligned=False)
        route(" E=257 odd, traced", tokens=tokens, experts=257, aligned=False, trace=_trace(tokens, 257))
        for experts in (E, 257):
            only_ids = _trace(tokens, experts, only_ids=True)
            route(f" E={experts}, ids traced", tokens=tokens, experts=experts, trace=only_ids)
    route(" E=600, no choice", tokens=256, experts=600)
    route("", torch.float16, "fp32", tokens=1024)
    tokens = 1024
    for experts in (E, 257):
        logits = meta(tokens, experts), meta(experts), K
        recorder.tell(f"bfloat16 E={experts}", tokens)
        launch_topk_gate_fwd(*logits)
        recorder.tell(f"bfloat16 E={experts}, traced", tokens)
        launch_topk_gate_fwd(*logits, _trace(tokens, experts))
        recorder.tell(f"bfloat16 E={experts}, ids traced", tokens)
        launch_topk_gate_fwd(*logits, _trace(tokens, experts, only_ids=True))
    for experts, both in ((E, True), (E, False), (257, True)):
        recorder.tell(f"E={experts}{' with probabilities, scale' if both else ''}", tokens)
        grad, wide = (meta(tokens, n, dtype=torch.float32) for n in (K, experts))
        index = meta(tokens, K, dtype=torch.int64)
        launch_topk_gate_bwd(wide if both else None, grad, wide, index, meta(experts), both)
    for dtype in (torch.bfloat16, torch.float32):
        recorder.tell(str(dtype)[6:], tokens)
        router = (meta(tokens, H, dtype=dtype), meta(E, H, dtype=dtype), meta(H, dtype=dtype))
        launch_route_bwd(meta(tokens, E, dtype=torch.float32), *router, _EPS, (True, True, True))


def _record_router_of_ones(recorder: Recorder) -> None:
    """Every size is 1, which Triton turns into a constant."""
    recorder.tell("any, all sizes 1", 1, aligned=False)
    one, wide = meta(1, 1), meta(1, 1, dtype=torch.float32)
    launch_route_fwd(one, one, meta(1), meta(1), 1, _EPS, "hf", recorder.arch)
    launch_topk_gate_fwd(one, meta(1), 1)
    recorder.tell("traced, all sizes 1", 1, aligned=False)
    launch_topk_gate_fwd(one, meta(1), 1, _trace(1, 1, top_k=1))
    launch_topk_gate_bwd(wide, wide, wide, meta(1, 1, dtype=torch.int64), meta(1), True)
    launch_route_bwd(wide, one, one, meta(1), _EPS, (True, True, True))
