"""A minute of training, experts and all: the same losses as the stock model's, and experts that specialise."""

import copy
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import omnigene_fast

from . import audit
from .model import BOS, PAD, Batch, Size, byte_ids, encode_bytes, load_texts, small_model

TEXTS = 50  # per family in the shipped data
HELD_OUT = 6  # of these, the last ones, are not trained on


@dataclass(frozen=True)
class Lesson:
    """How much is trained: at most `steps` in about `seconds`, then `compared` steps of a stock copy in half of it."""

    steps: int = 400
    seconds: float = 40.0
    compared: int = 4
    batch: int = 12
    length: int = 128
    traced: int = 16  # texts of each family, the last ones, whose routing is compared before and after


def learn(device: torch.device, size: Size, lesson: Lesson | None = None, out: Path | None = None) -> str:
    """Train the small model in float32, trace it before and after, print what changed, and return the summary line.

    The optimizer, the data loader and the loss are those of transformers' Trainer, which needs the package
    accelerate; without it a sentence says that this part was skipped.

    Args:
        device: where the model runs.
        size: of the model.
        lesson: how much is trained.
        out: new directory for the traces `before` and `after` and their report.html; None: no trace.
    """
    lesson = lesson or Lesson()
    if importlib.util.find_spec("accelerate") is None:
        print("training: skipped, transformers' Trainer needs accelerate (pip install 'omnigene-fast[train]')\n")
        return "training: skipped, the package accelerate is not installed"
    from .training import Plan, chunks, train

    model = small_model(size, device)[0].float()
    texts = load_texts(TEXTS)
    samples = [
        sample
        for family in texts.values()
        for text in family[:-HELD_OUT]
        for sample in chunks([BOS, *byte_ids(text)], lesson.length)
    ]
    held_out = [
        encode_bytes([family[number] for family in texts.values()], lesson.length).to(device)
        for number in range(-HELD_OUT, 0)
    ]

    def plan(steps: int, seconds: float) -> Plan:
        return Plan(steps, lesson.batch, learning_rate=1e-3, seconds=seconds, checkpointing=False, bf16=False)

    print(
        f"training, every parameter with the experts' ({sum(p.numel() for p in model.parameters()) / 1e6:.0f} M,"
        f" float32, AdamW), {lesson.batch} x {lesson.length} tokens a step, next-byte loss in nats",
        flush=True,
    )
    stock_model = copy.deepcopy(model)
    omnigene_fast.accelerate(model)
    before, runs = _losses(model, held_out), []
    traced = {name: family[-lesson.traced :] for name, family in texts.items()}
    if out is not None:
        note = "random weights: what differs here is what the texts' bytes are"
        runs.append(
            audit.trace_families(model, out / "before", traced, lesson.length, "the small model, untrained", note)
        )
    ours = train(model, samples, plan(lesson.steps, lesson.seconds), pad=PAD, title="accelerated")
    after = _losses(model, held_out)
    if out is not None:
        note = f"trained from random weights in {len(ours.losses)} steps: an example, no finding"
        runs.append(audit.trace_families(model, out / "after", traced, lesson.length, "the small model, trained", note))
    stock = train(stock_model, samples, plan(lesson.compared, lesson.seconds / 2), pad=PAD, title="stock")

    apart = max(abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=False))
    print(f"\n  {'':<12}{'steps':>7}{'tokens/s':>10}{'peak MB':>9}   loss of the first steps")
    for name, run in (("stock", stock), ("accelerated", ours)):
        first = "  ".join(f"{loss:.6f}" for loss in run.losses[: lesson.compared])
        peak = "-" if run.peak is None else f"{run.peak / 1e6:,.0f}"
        print(f"  {name:<12}{len(run.losses):>7}{run.speed:>10,.0f}{peak:>9}   {first}")
    print(f"  relative difference of these losses: at most {apart:.0e}\n")
    print(
        f"held-out texts, {HELD_OUT} of each family: loss in nats per byte\n\n  {'family':<18}{'before':>8}{'after':>7}"
    )
    for row, name in enumerate(texts):
        print(f"  {name:<18}{before[row]:>8.2f}{after[row]:>7.2f}")
    print(flush=True)
    means = [sum(losses) / len(losses) for losses in (before, after)]
    line = (
        f"training: held-out loss {means[0]:.2f} to {means[1]:.2f} in {len(ours.losses)} steps at"
        f" {ours.speed / stock.speed:.2f}x the stock model's tokens/s"
    )
    if out is None:
        return line
    apart_before, apart_after = audit.print_differentiation(runs)
    omnigene_fast.analysis.report(runs, out / "report.html")
    return f"{line}; divergence between families {apart_before:.3f} to {apart_after:.3f} nats"


@torch.no_grad()
def _losses(model: Any, batches: list[Batch]) -> list[float]:
    """Mean next-token loss of each family, over the tokens of all batches."""
    model.eval()
    total = torch.zeros(len(batches[0].ids), 2, dtype=torch.float64)
    for batch in batches:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        mask = batch.mask[:, 1:].bool()
        total[:, 0] -= torch.where(mask, chosen, 0.0).sum(1).double().cpu()
        total[:, 1] += mask.sum(1).cpu()
    losses: list[float] = (total[:, 0] / total[:, 1]).tolist()
    assert all(math.isfinite(loss) for loss in losses), "the loss is not finite"
    return losses
