"""A minute of training, experts and all: the same losses as the stock model's, and experts that specialise."""

import copy
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

import omnigene_fast

from . import routing
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


def learn(device: torch.device, size: Size, lesson: Lesson | None = None) -> str:
    """Train the small model in float32, print what changed, and return the summary line.

    The optimizer, the data loader and the loss are those of transformers' Trainer, which needs the package
    accelerate; without it a sentence says that this part was skipped.
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
    before, counts_before = _losses(model, held_out), routing.visits(model, held_out)
    ours = train(model, samples, plan(lesson.steps, lesson.seconds), pad=PAD, title="accelerated")
    after, counts_after = _losses(model, held_out), routing.visits(model, held_out)
    stock = train(stock_model, samples, plan(lesson.compared, lesson.seconds / 2), pad=PAD, title="stock")

    apart = max(abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=False))
    print(f"\n  {'':<12}{'steps':>7}{'tokens/s':>10}{'peak MB':>9}   loss of the first steps")
    for name, run in (("stock", stock), ("accelerated", ours)):
        first = "  ".join(f"{loss:.6f}" for loss in run.losses[: lesson.compared])
        peak = "-" if run.peak is None else f"{run.peak / 1e6:,.0f}"
        print(f"  {name:<12}{len(run.losses):>7}{run.speed:>10,.0f}{peak:>9}   {first}")
    print(f"  relative difference of these losses: at most {apart:.0e}\n")
    print(f"held-out texts, {HELD_OUT} of each family; effective experts = exp(entropy), mean over layers\n")
    print(f"  {'':<18}{'loss':>15}{'effective experts':>24}\n  {'family':<18}{'before':>8}{'after':>7}", end="")
    print(f"{'before':>17}{'after':>7}")
    effective = [routing.effective(counts).mean(1) for counts in (counts_before, counts_after)]
    for row, name in enumerate(texts):
        print(f"  {name:<18}{before[row]:>8.2f}{after[row]:>7.2f}{effective[0][row]:>17.1f}{effective[1][row]:>7.1f}")
    apart_before, apart_after = (routing.divergence(counts) for counts in (counts_before, counts_after))
    print("\nhow differently two families are routed: Jensen-Shannon divergence in nats (at most ln 2 = 0.693), mean")
    print(f"over the pairs of families\n\n  {'layer':>5}{'before':>9}{'after':>8}")
    for layer, (first_, last) in enumerate(zip(apart_before.tolist(), apart_after.tolist(), strict=True)):
        print(f"  {layer:>5}{first_:>9.3f}{last:>8.3f}")
    print(flush=True)
    means = [sum(losses) / len(losses) for losses in (before, after)]
    return (
        f"training: held-out loss {means[0]:.2f} to {means[1]:.2f} in {len(ours.losses)} steps at"
        f" {ours.speed / stock.speed:.2f}x the stock model's tokens/s; divergence between families"
        f" {apart_before.mean():.3f} to {apart_after.mean():.3f} nats"
    )


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
