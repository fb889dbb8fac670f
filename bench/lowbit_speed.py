"""Experts on projections of 8 bits against the same layer in 16: the ratio of times, the error, the bytes.

    python -m omnigene_fast.bench.lowbit_speed [--tokens 1 16 64 256] [--seconds 4] [--shape H,I,E,K]

The two run in turns, each call with routing of its own, so that a machine that others use slows both: the ratio of each
neighbouring pair is taken, and the median of these is printed with the quartiles. The error is the relative one against
float64 with the 16-bit weights, so it holds what storing in 8 bits costs; `kernel` is that against the exact 8-bit
weights, what the arithmetic costs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import lowbit, reference
from ..ops import expert_mlp
from .workloads import Shape

CHECKED_EXPERTS = 4


def ratios(plain: Callable[[int], None], low: Callable[[int], None], seconds: float) -> tuple[list[float], float]:
    """Of neighbouring calls, plain over low, and the median seconds of low."""
    pairs: list[float] = []
    times: list[float] = []
    end = time.perf_counter() + seconds
    plain(0)
    low(0)
    while time.perf_counter() < end or len(pairs) < 7:
        took = []
        for call in (plain, low):
            start = time.perf_counter()
            call(len(pairs))
            took.append(time.perf_counter() - start)
        pairs.append(took[0] / took[1])
        times.append(took[1])
    return pairs, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--shape", default="2816,704,128,8", help="H,I,E,K")
    options = parser.parse_args()
    shape = Shape(*map(int, options.shape.split(",")))
    H, I, E, K = shape.H, shape.I, shape.E, shape.K  # noqa: E741
    generator = torch.Generator().manual_seed(0)

    def weights(*size: int) -> Tensor:
        made = torch.empty(size, dtype=torch.bfloat16)
        for expert in made:
            expert.copy_(torch.randn(expert.shape, generator=generator) / size[-1] ** 0.5)
        return made

    plain = (weights(E, 2 * I, H), weights(E, H, I))
    low = {name: [lowbit.quantise(weight, name) for weight in plain] for name in lowbit.FORMATS}
    print(f"H={H} I={I} E={E} K={K}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"bytes of a layer: bfloat16 {shape.layer_bytes(torch.bfloat16):,}")
    for name, sides in low.items():
        print(f"{'':18}{name} {sum(x.nbytes + scale.nbytes for x, scale in sides):,}")
    for name, sides in low.items():
        error(name, plain, sides, shape, generator)

    def inputs(T: int, n: int) -> list[tuple[Tensor, ...]]:
        return [
            (
                torch.randn(T, H, generator=generator).bfloat16(),
                torch.rand(T, E, generator=generator).topk(K, dim=1).indices,
                torch.rand(T, K, generator=generator),
            )
            for _ in range(n)
        ]

    def call(
        projections: Sequence[Tensor], scales: dict[str, Any], drawn: list[tuple[Tensor, ...]], backward: bool
    ) -> Callable[[int], None]:
        gate_up, down = projections

        def run(turn: int) -> None:
            hidden, index, weight = drawn[turn % len(drawn)]
            hidden = hidden.detach().requires_grad_(backward)
            out = expert_mlp(hidden, gate_up, down, index, weight, activation="gelu_tanh", **scales)
            if backward:
                out.backward(out.detach())

        return run

    cases = [(T, False) for T in options.tokens] + [(max(options.tokens), True)]
    for T, backward in cases:
        drawn = inputs(T, 8)
        for name, sides in low.items():
            scales = {"gate_up_scale": sides[0][1], "down_scale": sides[1][1]}
            ours = call([numbers for numbers, _ in sides], scales, drawn, backward)
            pairs, took = ratios(call(plain, {}, drawn, backward), ours, options.seconds)
            first, middle, last = statistics.quantiles(pairs, n=4)
            what = "forward and frozen backward" if backward else "forward"
            print(
                f"T={T:<5}{what:28}{name:14} {middle:5.2f}x ({first:.2f}-{last:.2f}) of bfloat16's speed,"
                f" {1e3 * took:8.2f} ms, {len(pairs)} pairs, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def error(
    name: str,
    plain: Sequence[Tensor],
    sides: Sequence[tuple[Tensor, Tensor]],
    shape: Shape,
    generator: torch.Generator,
) -> None:
    """Of a few experts, on which float64 is quick."""
    E = min(CHECKED_EXPERTS, shape.E)
    K = min(shape.K, E)
    hidden = torch.randn(8, shape.H, generator=generator).bfloat16()
    index = torch.rand(8, E, generator=generator).topk(K, dim=1).indices
    weight = torch.rand(8, K, generator=generator)
    (gate_up, up_scale), (down, down_scale) = ((x[:E], scale[:E]) for x, scale in sides)
    scales: dict[str, Any] = {"gate_up_scale": up_scale, "down_scale": down_scale}
    wide, wide_weight, kind = hidden.double(), weight.double(), "gelu_tanh"
    out = expert_mlp(hidden, gate_up, down, index, weight, activation=kind, **scales).double()
    exact = reference.expert_mlp(wide, gate_up, down, index, wide_weight, activation=kind, **scales)
    gate_up, down = (x[:E].double() for x in plain)
    truth = reference.expert_mlp(wide, gate_up, down, index, wide_weight, activation=kind)

    def relative(to: Tensor) -> float:
        return ((out - to).norm() / to.norm()).item()

    print(f"error {name:14} {relative(truth):.2e} against the 16-bit weights, kernel {relative(exact):.2e}")


if __name__ == "__main__":
    main()
