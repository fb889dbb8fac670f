"""Step "capture": CUDA graphs whose replays follow new routing, and torch.compile without graph breaks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnigene_fast import ops

from ..lowbit import low_bit
from ..workloads import EPS, Layer
from . import cases, status
from .decode import without_synchronising

GRAPH_TOKENS = (1, 8, 16, 64, 512, 4096)  # 16 is the most that the decode kernels serve
COMPILERS = ("aot_eager", "inductor")


def run(context: status.Context) -> str | None:
    """Capture and compile the block's operators; the sentence names what differs or breaks."""
    layer = Layer(cases.shape_of(context.tiny), torch.bfloat16, context.device)
    checks: dict[str, Callable[[], str]] = {}
    for count in GRAPH_TOKENS:
        tokens = cases.tokens_of(count, context.tiny)
        for train in (False, True):
            name = f"graph {'forward and backward' if train else 'forward'} T={tokens}"
            checks[name] = functools.partial(follows, layer, tokens, train)
    tokens = cases.tokens_of(8, context.tiny)
    checks[f"graph int8 T={tokens}"] = functools.partial(follows, layer, tokens, False, "experts_int8")
    for compiler in COMPILERS[:1] if context.tiny else COMPILERS:
        for train in (False, True):
            name = f"compile {compiler} {'forward and backward' if train else 'forward'}"
            checks[name] = functools.partial(compiles, layer, compiler, train)
    graphs = context.device.type == "cuda"

    def work(name: str) -> dict[str, Any]:
        if name.startswith("graph") and not graphs:
            return {"problem": "", "skipped": "CUDA graphs need a GPU"}
        return {"problem": checks[name]()}

    return status.problems(status.each(context, context.out / "capture.json", checks, work))


def block(layer: Layer, proj: Tensor, hidden: Tensor, trained: bool = False, stored: str = "") -> tuple[Tensor, ...]:
    """Router and experts of `hidden`; if `trained`, also the gradients of `hidden` and of the projection.

    `stored` is an operation of `LOW_BIT_OPS`, whose format the experts then have.
    """
    _, weights, index = ops.route(hidden, proj, layer.scale, layer.per_expert_scale, top_k=layer.shape.K, eps=EPS)
    gate_up_scale: Tensor | None
    down_scale: Tensor | None
    if stored:
        low = low_bit(layer, stored)
        gate_up, down, gate_up_scale, down_scale = low[:4]
    else:
        gate_up, down, gate_up_scale, down_scale = layer.gate_up, layer.down, None, None
    out = ops.expert_mlp(
        hidden,
        gate_up,
        down,
        index,
        weights,
        activation="gelu_tanh",
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
    )
    if not trained:
        return (out,)
    return (out, *torch.autograd.grad(out, (hidden, proj), out.detach()))


def follows(layer: Layer, tokens: int, train: bool, stored: str = "") -> str:
    """Replays of one captured graph on three other routings, against plain calls, bit for bit."""
    draws = list(layer.draws("uniform", tokens, 4))
    static = draws[0].hidden.clone().requires_grad_(train)
    proj = layer.projection("uniform").requires_grad_(train)
    call = functools.partial(block, layer, proj, static, train, stored)
    with torch.set_grad_enabled(train):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            without_synchronising(call)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        last: Tensor | None = None
        for turn, draw in enumerate(draws[1:], start=1):
            with torch.no_grad():
                static.copy_(draw.hidden)
            graph.replay()
            results = [tensor.clone() for tensor in captured]
            for number, (result, plain) in enumerate(zip(results, call(), strict=True)):
                if not torch.equal(result, plain):
                    return f"replay {turn}: tensor {number} is not that of a plain call"
            if last is not None and torch.equal(results[0], last):
                return f"replay {turn}: the same output for other tokens"
            last = results[0]
    return ""


def compiles(layer: Layer, compiler: str, train: bool) -> str:
    """One graph without breaks, for two numbers of tokens, against plain calls, bit for bit."""
    torch._dynamo.reset()
    proj = layer.projection("uniform").requires_grad_(train)

    def forward(hidden: Tensor) -> Tensor:
        return block(layer, proj, hidden)[0]

    compiled = torch.compile(forward, fullgraph=True, backend=compiler, dynamic=True)
    with torch.set_grad_enabled(train):
        for tokens in (17, 33):
            hidden = next(layer.draws("uniform", tokens, 1, seed=tokens)).hidden.requires_grad_(train)
            found = [compiled(hidden)]
            plain = list(block(layer, proj, hidden, train))
            if train:
                found += torch.autograd.grad(found[0], (hidden, proj), found[0].detach())
            for number, (one, other) in enumerate(zip(found, plain, strict=True)):
                if not torch.equal(one, other):
                    return f"T={tokens}: tensor {number} is not that of a plain call"
    return ""
