"""Images of molecules: the three LoRA stages of OmniGene-4-MM on a Gemma-4 with its vision tower, which stays frozen.

Drawings and captions are RDKit's. Then: captions of molecules that were not trained on, the homology answers that the
stages should preserve, and how differently the tokens of images and of text are routed.

    python examples/omnigene/multimodal.py --compare                 a small random model, stock and accelerated
    python examples/omnigene/multimodal.py --model CKPT --dtype bfloat16 --steps 2000
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measures
import shared
import stages
import torch
import train_lora
from homology import ANSWERS
from molecules import Molecule, constant_caption, f1, gallery, molecules, split_molecules
from shared import ACCELERATED, STOCK, Question
from vision import audit, load

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.demo.training import Plan, Run, train


@dataclass
class Work:
    """Each stage's training in every way, and the model's states before the stages and after each."""

    runs: dict[str, dict[str, Run]] = field(default_factory=dict)  # by stage, then by way
    states: dict[str, dict[str, stages.State]] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Train in every way, then say what came of it."""
    options = arguments(argv)
    for module in ("rdkit", "PIL", "matplotlib", "pyarrow", "duckdb", "pandas"):
        shared.need(module, {"PIL": "pillow"}.get(module))
    shared.start(options)
    results = shared.Results(options, "Images of molecules", __doc__.split("\n\n")[1])
    tests = split_molecules("test")[: options.limit]
    done = work(options, tests)
    report_training(results, options, done)
    if options.compare:
        report_equality(results, done)
    way = shared.ways(options)[-1]
    shown = {name: each[way] for name, each in done.states.items()}
    report_states(results, shown, tests, stages.asked(options))
    report_routing(results, options)
    said = list(shown.values())[-1].captions
    results.picture(gallery(tests[:6], said), "molecules", "Test molecules, and what the model says at the end.")
    results.save()


def work(options: argparse.Namespace, tests: Sequence[Molecule]) -> Work:
    """The three stages: each is trained in every way from the same weights, and goes on from those of the last way."""
    model, encoder = load(options)
    towers = {name: tensor.detach().cpu().clone() for name, tensor in stages.tower_parameters(model)}
    ways = shared.ways(options)
    pad = encoder.tokenizer.pad_token_id
    done = Work(states={"before": stages.states(model, encoder, options, tests)})
    audit(shared.switch(model, ways[-1]), encoder, tests, options, "before")
    for stage in stages.STAGES:
        model = stages.adapted(model, stage, options.seed)
        plan = Plan(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.lr or (stage.rate if options.model else stage.small_rate),
            bf16=model.dtype == torch.bfloat16,
            liger=train_lora.fused_loss(model, model.device),
            seed=options.seed,
        )
        some = stages.samples(encoder, stage, plan.steps * plan.batch, options)
        begin, runs = stages.trained(model), {}
        for way in reversed(ways):  # accelerated first: it pays for what a process needs once
            stages.put_back(shared.switch(model, way), begin)
            runs[way] = train(model, some, plan, pad=pad, title=f"{way}, {stage.name}", collator=encoder.batch)
            stages.check_towers(model, towers)
            if way == ways[-1]:
                end = stages.trained(model)
        stages.put_back(model, end)
        done.runs[stage.name] = dict(reversed(runs.items()))
        done.states[stage.name] = stages.states(model.eval(), encoder, options, tests)
    audit(shared.switch(model, ways[-1]), encoder, tests, options, "after")
    return done


def report_training(results: shared.Results, options: argparse.Namespace, done: Work) -> None:
    """What each stage trained on, its losses, tokens/s and peak memory."""
    rows = []
    for stage in stages.STAGES:
        runs = done.runs[stage.name]
        for row, run in zip(shared.side_by_side(runs), runs.values(), strict=True):
            ends = {"first loss": run.losses[0], "last loss": run.losses[-1]}
            rows.append({"stage": stage.name, "rank": stage.rank, "images": f"{stage.images:.0%}"} | ends | row)
    found, unread = molecules()
    train_count = len(split_molecules("train"))
    note = f"{len(found)} molecules, {train_count} of them to train on; {unread} SMILES could not be read. "
    note += f"{options.steps} steps of {options.batch} samples a stage; no parameter of the vision tower changed."
    results.table("The three stages", rows, note)


def report_equality(results: shared.Results, done: Work) -> None:
    """How far the two ways are apart: losses, answers and captions."""
    rows = []
    for name, both in done.states.items():
        row: dict[str, Any] = {"stage": name, "losses of ten steps": None, "all losses": None}
        if name in done.runs:
            runs = done.runs[name]
            losses = zip(runs[STOCK].losses, runs[ACCELERATED].losses, strict=True)
            apart = [abs(ours - stock) / abs(stock) for stock, ours in losses]
            row |= {"losses of ten steps": f"{max(apart[:10]):.1e}", "all losses": f"{max(apart):.1e}"}
        a, b = both[STOCK], both[ACCELERATED]
        answers = (a.margins > 0) == (b.margins > 0)
        captions = [x == y for x, y in zip(a.captions, b.captions, strict=True)]
        row |= {"homology answers equal": f"{int(answers.sum())} of {len(answers)}"}
        row |= {"margins up to": a.margins.abs().max().item(), "apart": f"{(a.margins - b.margins).abs().max():.1e}"}
        row |= {"captions equal": f"{sum(captions)} of {len(captions)}"}
        rows.append(row | {"captions not empty": sum(bool(each.strip()) for each in a.captions)})
    note = "Losses: largest relative difference. Each stage begins in both ways with the same weights, those that the"
    note += " accelerated training of the stage before left; answers and captions are of the same weights too."
    results.table("Stock and accelerated", rows, note)


def report_states(
    results: shared.Results, shown: dict[str, stages.State], tests: Sequence[Molecule], pairs: Sequence[Question]
) -> None:
    """Captions and homology answers before the stages and after each."""
    before = shown["before"].margins > 0
    right = torch.tensor([question.answer == ANSWERS[0] for question in pairs])
    rows = []
    for name, one in shown.items():
        yes, apart = one.margins > 0, one.other - one.own
        correct = measures.accuracy((yes == right).tolist())
        row = {"after stage": name, "caption F1": f1(one.captions, tests), "own image": one.own.mean().item()}
        row["other image, more by"] = f"{apart.mean():+.4f} ± {1.96 * apart.std() / len(apart) ** 0.5:.4f}"
        row["homology accuracy"] = f"{correct['accuracy']:.3f} [{correct['low']:.3f}, {correct['high']:.3f}]"
        rows.append(row | {"answers as before": f"{int((yes == before).sum())} of {len(yes)}"})
    constant = constant_caption(split_molecules("train"))
    rows.append({"after stage": f"always {constant!r}", "caption F1": f1([constant] * len(tests), tests)})
    note = (
        f"{len(tests)} test molecules, {len(pairs)} test pairs of proteins. F1: of the groups that are named, over all"
    )
    note += " molecules together; 0 if none is spelled right. Images: loss of the right caption in nats per token,"
    note += " with a 95 % interval."
    results.table("Captions, and whether the homology answers are preserved", rows, note)


def report_routing(results: shared.Results, options: argparse.Namespace) -> None:
    """How differently tokens of images and of text are routed, before and after the stages."""
    figure, axis = shared.axes()
    rows = []
    for name, colour in (("before", "#0072B2"), ("after", "#D55E00")):
        layers, mean = analysis.divergence_tables(omnigene_fast.open_trace(options.out / f"trace_{name}"), "kind")
        for each in mean.to_dict("records"):
            row = {"stages": name, "tokens": f"{each['a']} and {each['b']}", "divergence": each["corrected"]}
            row |= {"low": each["low"], "high": each["high"], "floor": each["floor_95"] - each["floor"]}
            rows.append(row | {"p": each["p_value"], "counted": f"{each['tokens_a']:,} and {each['tokens_b']:,}"})
        some = layers[(layers["a"] == "image") & (layers["b"] == "text")]
        error = [some["corrected"] - some["low"], some["high"] - some["corrected"]]
        axis.errorbar(some["layer"], some["corrected"], error, marker="o", capsize=4, color=colour, label=name)
        floor = some["floor_95"] - some["floor"]
        axis.plot(some["layer"], floor, color=colour, ls=":", label=f"{name}, 95 % of chance")
    axis.set(xlabel="layer", ylabel="Jensen-Shannon divergence (nats)", xticks=list(some["layer"]), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(loc="best")
    note = "Jensen-Shannon divergence in nats, mean over layers, corrected for the molecules' noise, with its 95 %"
    note += " interval; floor: what it stays below in 95 % of the cases if the two are routed alike."
    note += " The image and the text of a molecule count as two documents."
    results.table("Routing of image and text tokens", rows, note)
    results.picture(figure, "routing", "Image tokens against the text tokens beside them, in each layer.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__, "multimodal")
    add = parser.add_argument
    for name, default, what in (
        ("steps", 14, "optimizer steps of a stage"),
        ("limit", 32, "test molecules, and test pairs of proteins"),
        ("length", 256, "characters of a text that are kept"),
        ("tokens", 32, "tokens of a caption that is generated"),
    ):
        add(f"--{name}", type=train_lora.positive, default=default, help=f"{what} (default: {default})")
    rates = [", ".join(f"{getattr(each, name):g}" for each in stages.STAGES) for name in ("rate", "small_rate")]
    add("--lr", type=float, help=f"of all stages (default: the paper's {rates[0]}; of the small model {rates[1]})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    shared.script("multimodal", main)
