"""One MoE layer's experts at Gemma-4-26B-A4B's true shape, against transformers' own paths."""

import torch
from tqdm import tqdm

from omnigene_fast import info
from omnigene_fast.bench import report, runner
from omnigene_fast.bench.providers import OURS, TRANSFORMERS

TOKENS = (1, 16, 256)


def true_shape(device: torch.device, settings: runner.Settings | None = None) -> str:
    """Print milliseconds and speed-up at T = 1, 16, 256; return the summary line.

    Short memory is not an error: a sentence says that the comparison was skipped.
    """
    settings = settings or runner.Settings(
        ops=("experts",),
        tokens=TOKENS,
        modes=("uniform",),
        providers=(OURS, *TRANSFORMERS),
        device=device,
        seconds=3.0,
        min_rounds=5,
    )
    shape = settings.shape
    print(
        f"one layer's experts at H={shape.H}, I={shape.I}, E={shape.E}, K={shape.K}, bfloat16"
        f" ({shape.layer_bytes(settings.dtype) / 1e9:.2f} GB), uniform routing redrawn on each call; milliseconds,\n"
        "medians of interleaved rounds; every implementation is first checked against float64\n"
    )
    try:
        with tqdm(total=len(settings.cases()), desc="true shape", leave=False) as bar:
            rows = runner.run(
                settings,
                info.environment(device, settings.dtype, settings.backend),
                lambda case: (bar.set_description(case), bar.update())[1],
            )
    except MemoryError as short:
        print(f"  skipped: {short}\n", flush=True)
        return "true shape: skipped, memory is short"
    names = [OURS, *TRANSFORMERS]
    print(f"  {'T':>5}" + "".join(f"{name:>15}" for name in names) + f"{'speed-up':>10}{'x floor':>9}{'error':>10}")
    gains = []
    for case in report.cases(rows):
        by_name = {row["provider"]: row for row in case}
        ours = by_name[OURS]
        cells = "".join(f"{_cell(by_name[name]):>15}" for name in names)
        gain, over = ours["best_peer_over_this"], ours["over_floor"]
        gains.append(gain)
        print(
            f"  {ours['tokens']:>5}{cells}"
            + (f"{gain:>9.2f}x" if gain else f"{'-':>10}")
            + (f"{over:>9.2f}" if over else f"{'-':>9}")
            + (f"{ours['error']:>10.1e}" if isinstance(ours["error"], float) else f"{'-':>10}")
        )
    first = rows[0]
    print(
        f"\n  speed-up: against the best of transformers' three; floor: {first['bandwidth_gb_s']:.0f} GB/s and"
        f" {first['peak_gflop_s']:.0f} GFLOP/s\n  probed in this process; error: against float64 (transformers' eager:"
        f" {first['eager_error']:.1e}); -: its copies of the weights\n  would not fit (batched_mm copies them for every"
        " token and expert)\n",
        flush=True,
    )
    if not all(gains):
        return "true shape: omnigene_fast gave WRONG numbers or did not run"
    return (
        "true shape: "
        + ", ".join(f"{gain:.1f}x at T={tokens}" for gain, tokens in zip(gains, settings.tokens, strict=True))
        + " against transformers' best path"
    )


def _cell(row: runner.Row) -> str:
    if row["p50_ms"]:
        return f"{row['p50_ms']:.3g}" if row["p50_ms"] < 100 else f"{row['p50_ms']:.0f}"
    return "-" if row["status"] == "skipped" else str(row["status"])
