"""Continued pre-training on 12 families of sequences and texts, by the recipe of OmniGene-4.

LoRA r=64, alpha=128 on attention, dense MLP and router.proj, the embedding trained in full, gradient checkpointing; the
experts frozen, as in the paper, or with `--experts lora|full`. The training is that of examples/train_lora.py. What
comes out is OUT/model, the checkpoint of the next stage.

    python examples/omnigene/cpt.py --compare
    python examples/omnigene/cpt.py --model CKPT --steps 2000 --length 1024 --batch 4 --out out/cpt
    torchrun --nproc_per_node 2 examples/omnigene/cpt.py --batch 4          two processes by DDP; FSDP2 with --fsdp

The last 16 of the 50 texts of every family are left for the audit. Of the others are left out those that hold what a
script asks for later: a domain or a term of a test part, or a sequence of the audit's texts.
"""

import argparse
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import shared
import train_lora

from omnigene_fast.demo.model import load_texts
from omnigene_fast.demo.training import Run, join

TRAINED = 34  # texts of a family that may be trained on


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Train, report; what came of it as "stock" and "accelerated"."""
    options = parser(__doc__, "cpt", steps=60).parse_args(argv)
    start(options)
    rows = [{"text": text} for each in texts().values() for text in each]
    dropped = sum(map(len, load_texts(TRAINED).values())) - len(rows)
    about = f"next-token prediction on {len(rows)} texts of {len(texts())} families; {dropped} more left out, because"
    return stage(options, rows, "Continued pre-training", f"{about} they hold what is tested or audited later")


def texts() -> dict[str, list[str]]:
    """The texts of each family that are trained on."""
    return {family: [text for text in each if not held(text)] for family, each in load_texts(TRAINED).items()}


@functools.cache
def held(text: str) -> bool:
    """Whether a text holds something that is tested or audited, or is a part of it; in any case of letters."""
    text = text.upper()
    return any(each in text or text in each for each in held_out())


@functools.cache
def held_out() -> frozenset[str]:
    """What no stage may train on, in upper case: the audit's texts, the terms and domains (sequence, 3Di, DSSP) of the
    test parts, and what of other domains is in a text of the audit."""
    audited = [text.upper() for each in load_texts(10**6).values() for text in each[TRAINED:]]
    terms = load_texts(10**6)["text_biology"]
    tested = {domain.name for domain in shared.split_domains("test")}
    made = {*audited, *(text.upper() for text in terms if shared.by_hash(text.split(". ", 1)[0]) == "test")}
    for name, domain in shared.domains().items():
        for track in (domain.sequence, *domain.tracks.values()):
            if name in tested or any(track.upper() in text for text in audited):
                made.add(track.upper())
    return frozenset(made)


def start(options: argparse.Namespace) -> None:
    """What a stage of training does first: what is missing shows before anything long begins."""
    for module in ("peft", "accelerate", "matplotlib"):
        shared.need(module)
    shared.start(options)


def parser(doc: str | None, out: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a stage of training; `defaults` replace theirs."""
    made = shared.parser(doc or "", out)
    add = made.add_argument
    add("--experts", choices=("frozen", "lora", "full"), default="frozen", help="what of the experts is trained")
    add("--steps", type=train_lora.positive, default=60, help="default: %(default)s")
    add("--length", type=train_lora.positive, default=256, help="tokens of a sample at most (default: %(default)s)")
    add("--rank", type=train_lora.positive, default=64, help="of LoRA; alpha is twice that (default: %(default)s)")
    add("--lr", type=float, help="learning rate (default: 2e-4; for the small model 2e-3 in cpt, 1e-3 in sft)")
    add("--optimizer", default="adamw_torch", help="as TrainingArguments' optim, e.g. paged_adamw_8bit")
    add("--fsdp", action="store_true", help="under torchrun: FSDP2 in place of DDP")
    made.set_defaults(**{"small_rate": 2e-3} | defaults)
    return made


def stage(
    options: argparse.Namespace, rows: Sequence[dict[str, str]], title: str, about: str, *more: str
) -> dict[str, Run]:
    """Train on `rows` as train_lora does with the options `more`, leave OUT/model, report."""
    base, rank, world = shared.checkpoint(options), *join()
    dtype = shared.dtype_of(options, base)
    lr = options.lr or (2e-4 if options.model else options.small_rate)
    data = options.out / "data.jsonl"
    beside = data.with_name(f"data.jsonl.{rank}")  # every process writes the same file: none reads half of one
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(beside, data)
    passed = {"steps", "batch", "length", "rank", "optimizer", "seed", "experts"}
    arguments = ["--model", base, "--data", data, "--merged", options.out / "model", "--dtype", dtype, "--lr", lr]
    arguments += [each for name in sorted(passed) for each in (f"--{name}", getattr(options, name))]
    arguments += [flag for flag in ("--stock", "--compare", "--fsdp") if getattr(options, flag[2:])]
    arguments += ["--threads", options.threads] if options.threads else []
    runs = train_lora.main([*map(str, arguments), *more])
    if rank == 0:
        several = f", {world} processes by {'FSDP2' if options.fsdp else 'DDP'}" if world > 1 else ""
        results = shared.Results(options, title + several, about)
        note = shared.check_losses(results, runs, dtype) if len(runs) > 1 else ""
        results.table("Loss in nats per token", losses(runs), note)
        results.table("Speed and memory", shared.side_by_side(runs))
        results.picture(curves(runs), "loss", f"{title}: the losses{' of both ways' if len(runs) > 1 else ''}.")
        results.link(options.out / "model" / "config.json", "checkpoint")
        results.save()
    return runs


def losses(runs: dict[str, Run], rows: int = 8) -> list[dict[str, Any]]:
    """A few steps with the losses of each way, the first and the last among them."""
    count = len(next(iter(runs.values())).losses)
    shown = sorted({round(at * (count - 1) / max(1, rows - 1)) for at in range(rows)})
    return [{"step": at + 1, **{way: f"{run.losses[at]:.6f}" for way, run in runs.items()}} for at in shown]


def curves(runs: dict[str, Run]) -> Any:
    """The losses step by step as a figure."""
    figure, axis = shared.axes()
    styles = {"stock": {"color": "#0072B2", "lw": 4, "alpha": 0.4}, "accelerated": {"color": "#D55E00", "lw": 1.4}}
    for way, run in runs.items():
        axis.plot(range(1, len(run.losses) + 1), run.losses, label=f"{way}, {run.speed:,.0f} tokens/s", **styles[way])
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


if __name__ == "__main__":
    shared.script("cpt", main)
