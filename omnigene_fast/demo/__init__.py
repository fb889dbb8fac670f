"""`omnigene-fast demo`: real sequences through a stock and an accelerated Gemma-4, then training and a router audit."""

from pathlib import Path

import torch

from ..info import busy
from ..tracing.layout import check_place
from . import compare, layer
from .audit import missing_packages
from .lesson import Lesson, learn
from .model import Size, load_checkpoint, load_texts, small_model

__all__ = ["Lesson", "Size", "run"]


def run(
    device: torch.device,
    checkpoint: Path | None = None,
    *,
    true_shape: bool = True,
    train: bool = True,
    size: Size | None = None,
    lesson: Lesson | None = None,
    out: Path | None = None,
) -> None:
    """Print parity per layer, the experts each family prefers, tokens/s, training, and one layer at the true shape.

    Args:
        device: where the model runs.
        checkpoint: a directory with a transformers checkpoint and its tokenizer; a small random Gemma-4 by default.
        true_shape: also time one layer at Gemma-4-26B-A4B's size.
        train: also train the small model for less than a minute; a checkpoint is never trained.
        size: of the small model and of the texts; tests pass a tiny one.
        lesson: how much is trained.
        out: new directory for router traces of the small model before and after its training, and a report on them,
            whose path is the last line printed; None: no traces.

    Raises:
        ValueError: `checkpoint` is not a checkpoint directory or has no mixture-of-experts layer.
        FileExistsError: `out` exists.
    """
    size, remark = size or Size(), busy()
    audited = out if train and checkpoint is None else None
    if audited is not None:
        if audited.exists():
            raise FileExistsError(f"out: expected a directory that does not exist yet, got {audited}.")
        check_place(audited)
        if absent := missing_packages():
            print(f"router audit: skipped, {', '.join(absent)} missing (pip install 'omnigene-fast[report]')\n")
            audited = None
    model, encode, title = load_checkpoint(checkpoint, device) if checkpoint else small_model(size, device)
    texts = load_texts(size.texts)
    print(f"omnigene-fast demo on {device}\n\n{title}", flush=True)
    print(
        f"texts: {len(texts)} families of real sequences and prose, {size.texts} each, at most {size.length} tokens;"
        " padding is masked and not counted\n",
        flush=True,
    )
    batches = [
        encode([family[number] for family in texts.values()], size.length).to(device) for number in range(size.texts)
    ]
    summary = [
        compare.parity(model, batches[0]),
        compare.preferences(model, batches, list(texts), random_weights=checkpoint is None),
        compare.speed(model, batches[0], size.rounds),
    ]
    del model
    if train and checkpoint is None:
        summary.append(learn(device, size, lesson, audited))
    if true_shape:
        summary.append(layer.true_shape(device))
    print("summary")
    for line in [*summary, *([remark] if remark else [])]:
        print(f"  {line}")
    if audited is not None and (audited / "report.html").exists():
        print(f"\nrouter audit, before and after the training:\n{audited / 'report.html'}")
