"""Audit the routers of three checkpoints, base, CPT and SFT: which stage made the experts differ, with intervals.

The question is that of the OmniGene-4 paper: how differently are kinds of sequences routed, and did that come with
continued pre-training or with instruction tuning? Every text is traced through each checkpoint, the three runs are
compared document by document, and a report is written.

    python examples/audit_three_checkpoints.py                        a small random model, trained on the spot
    python examples/audit_three_checkpoints.py --models BASE CPT SFT --data texts.jsonl --label-col task

Without --models a small Gemma-4 with byte tokens stands for the base; some steps of next-byte training on sequences
of 12 families make the CPT checkpoint of it, some of questions about the kind of a sequence (the answer alone is
learned) the SFT one. What such a model shows is that the audit works, not what a trained one has learned.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.demo.audit import print_differentiation, trace_families
from omnigene_fast.demo.model import BOS, EOS, PAD, Size, byte_ids, load_texts, small_model
from omnigene_fast.demo.training import IGNORED, Plan, Sample, chunks, train
from omnigene_fast.tracing.run import Run

STAGES = ("base", "cpt", "sft")
SMALL = Size(H=256, I=64, E=64, K=8, layers=4)
LENGTH = 128  # bytes of a text


def main() -> None:
    """Trace, compare, report."""
    options = arguments()
    if options.out.exists():
        raise ValueError(f"--out: expected a directory that does not exist yet, got {options.out}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = trace_checkpoints(options) if options.models else trace_small_model(options)
    print()
    print_differentiation(runs)
    table = analysis.decompose(*runs, by="task", permutations=options.permutations)
    print_decomposition(table)
    print(analysis.report(runs, options.out / "report.html", by="task", permutations=options.permutations))


def trace_checkpoints(options: argparse.Namespace) -> list[Run]:
    """Runs of three checkpoint directories over the rows of --data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from omnigene_fast.tracing.texts import read_rows, trace_texts

    rows = read_rows(options.data, options.text_col, [options.label_col])
    for row in rows:
        row.labels["task"] = row.labels.pop(options.label_col)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for stage, path in zip(STAGES, options.models, strict=True):
        if not (path / "config.json").is_file():
            raise ValueError(f"--models: expected checkpoint directories with a config.json, got {path}.")
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
        trace_texts(
            omnigene_fast.accelerate(model),
            lambda texts, tokenizer=tokenizer: tokenizer(texts)["input_ids"],
            rows,
            options.out / stage,
            max_length=options.max_length,
            progress=True,
            meta={"model": str(path), "tokenizer": str(path)},
        )
        del model
    return [omnigene_fast.open_trace(options.out / stage) for stage in STAGES]


def trace_small_model(options: argparse.Namespace) -> list[Run]:
    """Runs of the small model before, between and after its two trainings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = load_texts(50)
    audited = {family: each[-options.texts :] for family, each in texts.items()}
    learned = {family: each[: -options.texts] for family, each in texts.items()}
    model = omnigene_fast.accelerate(small_model(SMALL, device, options.seed)[0].float())
    lessons = {"cpt": sequences(learned), "sft": questions(learned)}
    runs = []
    for stage in STAGES:
        if stage in lessons:
            plan = Plan(options.steps, batch=12, learning_rate=1e-3, checkpointing=False, bf16=False, seed=options.seed)
            made = train(model, lessons[stage], plan, pad=PAD, title=stage)
            print(f"{stage}: loss {made.losses[0]:.2f} to {made.losses[-1]:.2f} nats in {len(made.losses)} steps")
        model.eval()
        runs.append(trace_families(model, options.out / stage, audited, LENGTH, f"small model, {stage}"))
    return runs


def sequences(texts: dict[str, list[str]]) -> list[Sample]:
    """Texts in pieces, every byte of them learned."""
    return [piece for each in texts.values() for text in each for piece in chunks([BOS, *byte_ids(text)], LENGTH)]


def questions(texts: dict[str, list[str]]) -> list[Sample]:
    """Questions about the kind of a sequence, of which the answer alone is learned."""
    samples: list[Sample] = []
    for family, each in texts.items():
        for text in each:
            asked = [BOS, *byte_ids(f"{text[:90]}\nWhich kind? ")]
            answer = [*byte_ids(family), EOS]
            samples.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})
    return samples


def print_decomposition(table: Any) -> None:
    """Growth of expert differentiation by stage, and its shares."""
    print("growth of expert differentiation by stage, paired by document, corrected, with 95 % intervals\n")
    print(f"  {'convention':<12}{'stage':<7}{'before':>8}{'after':>8}{'growth':>9}  {'interval':<20}share of the two")
    for row in table.to_dict("records"):
        interval = f"[{row['low']:.4f}, {row['high']:.4f}]"
        share = f"{row['share_corrected']:.1%} [{row['share_low']:.1%}, {row['share_high']:.1%}]"
        print(
            f"  {row['convention']:<12}{row['stage'][2:]:<7}{row['before']:>8.4f}{row['after']:>8.4f}"
            f"{row['corrected']:>9.4f}  {interval:<20}{share}"
        )
    print(
        "\n  divergence: mean Jensen-Shannon divergence, in nats; distance: mean of its square root, the scale on which"
        "\n  the paper's text counts. Where the two stages together changed little, a share has no bounds.\n"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs=3, type=Path, metavar=("BASE", "CPT", "SFT"), help="checkpoint directories with tokenizers")
    add("--data", type=Path, help="JSON lines to trace through --models")
    add("--text-col", default="text", help="column with the text (default: text)")
    add("--label-col", default="task", help="column with the kind of sequence (default: task)")
    add("--max-length", type=int, default=1024, help="tokens of a text (default: 1024)")
    add("--steps", type=int, default=60, help="of each training of the small model (default: 60)")
    add("--texts", type=int, default=16, help="of each family that are audited and not learned (default: 16)")
    add("--permutations", type=int, default=1000, help="for noise floors and p-values (default: 1000)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, default=Path("audit"), help="new directory for runs and report (default: audit)")
    options = parser.parse_args()
    if bool(options.models) != bool(options.data):
        parser.error("--models and --data go together")
    return options


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        sys.exit("audit_three_checkpoints: " + " ".join(str(error).split()))
