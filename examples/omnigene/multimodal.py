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

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measures
import shared
import torch
import train_lora
from homology import ANSWERS
from molecules import Molecule, constant_caption, f1, gallery, molecules, split_molecules
from shared import ACCELERATED, STOCK, Question
from stages import SMALL_RATE, STAGES, State, adapted, asked, check_towers, samples, state, tower_parameters
from vision import audit, load

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.demo.training import Plan, Run, train


@dataclass
class Work:
    """One way's training, stage by stage, and its states before and after each."""

    runs: dict[str, Run] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Train in every way, then say what came of it."""
    options = arguments(argv)
    for module in ("rdkit", "PIL", "matplotlib", "pyarrow", "duckdb", "pandas"):
        shared.need(module, {"PIL": "pillow"}.get(module))
    shared.start(options)
    results = shared.Results(options, "Images of molecules", __doc__.split("\n\n")[1])
    tests = split_molecules("test")[: options.limit]
    # Accelerated first: it pays for what a process needs once.
    done = {way: work(options, way, tests) for way in reversed(shared.ways(options))}
    done = dict(sorted(done.items(), reverse=True))
    report_training(results, options, done)
    if options.compare:
        report_equality(results, done)
    shown = done[shared.ways(options)[-1]]
    report_states(results, shown, tests, asked(options))
    report_routing(results, options)
    said = list(shown.states.values())[-1].captions
    results.picture(gallery(tests[:6], said), "molecules", "Test molecules, and what the model says at the end.")
    results.save()


def work(options: argparse.Namespace, way: str, tests: Sequence[Molecule]) -> Work:
    """The three stages in one way; the states and, in the way that is reported, the routing before and after them."""
    model, encoder = load(options)
    if way == ACCELERATED:
        omnigene_fast.accelerate(model)
    towers = {name: tensor.detach().cpu().clone() for name, tensor in tower_parameters(model)}
    audited = way == shared.ways(options)[-1]
    done = Work(states={"before": state(model, encoder, options, tests)})
    if audited:
        audit(model, encoder, tests, options, "before")
    for stage in STAGES:
        model = adapted(model, stage, options.seed)
        plan = Plan(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.lr or (stage.rate if options.model else SMALL_RATE),
            bf16=model.dtype == torch.bfloat16,
            liger=train_lora.fused_loss(model, model.device),
            seed=options.seed,
        )
        some = samples(encoder, stage, plan.steps * plan.batch, options)
        pad = encoder.tokenizer.pad_token_id
        done.runs[stage.name] = train(model, some, plan, pad=pad, title=f"{way}, {stage.name}", collator=encoder.batch)
        check_towers(model, towers)
        done.states[stage.name] = state(model.eval(), encoder, options, tests)
    if audited:
        audit(model, encoder, tests, options, "after")
    return done


def report_training(results: shared.Results, options: argparse.Namespace, done: dict[str, Work]) -> None:
    """What each stage trained on, its losses, tokens/s and peak memory."""
    rows = []
    for stage in STAGES:
        runs = {way: one.runs[stage.name] for way, one in done.items()}
        for row, run in zip(shared.side_by_side(runs), runs.values(), strict=True):
            ends = {"first loss": run.losses[0], "last loss": run.losses[-1]}
            rows.append({"stage": stage.name, "rank": stage.rank, "images": f"{stage.images:.0%}"} | ends | row)
    found, unread = molecules()
    train_count = len(split_molecules("train"))
    note = f"{len(found)} molecules, {train_count} of them to train on; {unread} SMILES could not be read. "
    note += f"{options.steps} steps of {options.batch} samples a stage; no parameter of the vision tower changed."
    results.table("The three stages", rows, note)


def report_equality(results: shared.Results, done: dict[str, Work]) -> None:
    """How far the two ways are apart: losses, answers and captions."""
    stock, ours = done[STOCK], done[ACCELERATED]
    rows = []
    for name, run in stock.runs.items():
        apart = [abs(b - a) / abs(a) for a, b in zip(run.losses, ours.runs[name].losses, strict=True)]
        a, b = stock.states[name], ours.states[name]
        answers = (a.margins > 0) == (b.margins > 0)
        captions = [x == y for x, y in zip(a.captions, b.captions, strict=True)]
        row = {"stage": name, "losses of ten steps": f"{max(apart[:10]):.1e}", "all losses": f"{max(apart):.1e}"}
        row |= {"homology answers equal": f"{int(answers.sum())} of {len(answers)}"}
        rows.append(row | {"captions equal": f"{sum(captions)} of {len(captions)}"})
    note = "Losses: largest relative difference. Each stage begins with what its own way made of the stage before."
    results.table("Stock and accelerated", rows, note)


def report_states(results: shared.Results, shown: Work, tests: Sequence[Molecule], pairs: Sequence[Question]) -> None:
    """Captions and homology answers before the stages and after each."""
    before = shown.states["before"].margins > 0
    right = torch.tensor([question.answer == ANSWERS[0] for question in pairs])
    rows = []
    for name, one in shown.states.items():
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
    note += " molecules together. Images: loss of the right caption in nats per token, with a 95 % interval."
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
    results.table("Routing of image and text tokens", rows, note)
    results.picture(figure, "routing", "Image tokens against the text tokens beside them, in each layer.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__, "multimodal")
    add = parser.add_argument
    for name, default, what in (
        ("steps", 20, "optimizer steps of a stage"),
        ("limit", 32, "test molecules, and test pairs of proteins"),
        ("length", 256, "characters of a text that are kept"),
        ("tokens", 32, "tokens of a caption that is generated"),
    ):
        add(f"--{name}", type=train_lora.positive, default=default, help=f"{what} (default: {default})")
    add("--lr", type=float, help=f"of all stages (default: the paper's 5e-6, 3e-6, 2e-5; small model {SMALL_RATE})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    shared.script("multimodal", main)
