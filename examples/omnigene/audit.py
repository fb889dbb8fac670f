"""Audit the routers of three checkpoints, base, CPT and SFT: which stage made the experts differ, with intervals.

The questions are those of the OmniGene-4 paper. How differently are the families of sequences routed, and did that come
with continued pre-training or with instruction tuning? And does the gate decide an answer, or the modality alone?

    python examples/omnigene/audit.py                                 a small random model, trained on the spot
    python examples/omnigene/audit.py --models BASE CPT SFT           checkpoints, such as those of cpt.py and sft.py
    python examples/omnigene/audit.py --models BASE CPT SFT --data texts.jsonl --label-col kind
    python examples/omnigene/audit.py --compare                       traced by the gate and by hooks, side by side

The texts are the last 16 of each of the 12 families, which neither cpt.py nor sft.py learns. Without --models a small
model is trained on the others, then on questions about their kind: that shows that the audit works, no more.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cpt
import gate_or_experts as gate
import sft
import shared
import torch

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.bench.memory import peak_bytes
from omnigene_fast.demo.audit import NEEDED
from omnigene_fast.demo.model import BOS, EOS, PAD, byte_ids, load_texts
from omnigene_fast.demo.training import IGNORED, Plan, Sample, chunks, train
from omnigene_fast.tracing.run import Run
from omnigene_fast.tracing.texts import Row, read_rows, trace_texts

STAGES = ("base", "cpt", "sft")
GROWTH = ["convention", "stage", "before", "after", "corrected", "low", "high"]
GROWTH += ["share_corrected", "share_low", "share_high"]
SHARD = 8192  # tokens of a part file: several, so that workers can share them (audit_dask.py)


def main(argv: Sequence[str] | None = None) -> None:
    """Trace, compare, report."""
    options = arguments(argv)
    for module in (*NEEDED, "matplotlib"):
        shared.need(module)
    rows = audited(options)
    shared.start(options)
    shutil.rmtree(options.out / "traces", ignore_errors=True)  # those of another run of this script
    results = shared.Results(options, "Router audit", (__doc__ or "").split("\n\n")[1])
    traced: dict[str, list[Run]] = {way: [] for way in shared.ways(options)}
    measured = {way: shared.Measured() for way in traced}
    for stage, model, tokenizer in checkpoints(options):
        for way, runs in traced.items():
            shared.switch(model, way)
            runs.append(trace_families(model, encoder(tokenizer), rows, stage, way, options, measured[way]))
        if stage != STAGES[-1]:
            del model  # there may not be room for two
    runs = traced[shared.ways(options)[-1]]
    differentiation(runs, options, results)
    results.table(
        "Growth of expert differentiation by stage, paired by document, corrected, with 95 % intervals",
        analysis.decompose(*runs, permutations=options.permutations)[GROWTH],
        "divergence: mean Jensen-Shannon divergence, in nats; distance: mean of its square root, as in the paper."
        "\n  Where the two stages together changed little, a share has no bounds.",
    )
    gate.audit(model, encoder(tokenizer), runs[-1], options, results)
    if options.compare:
        compare(traced, measured, results)
    report = analysis.report(runs, options.out / "report.html", permutations=options.permutations)
    results.link(Path(report), "the whole report")
    results.save()


def audited(options: argparse.Namespace) -> list[Row]:
    """The texts, labelled with their "task"; and two by two of one task with a "pair"."""
    if options.data:
        rows = read_rows(options.data, options.text_col, [options.label_col])
        rows = [Row(row.number, row.text, {"task": row.labels.get(options.label_col, "none")}) for row in rows]
    else:
        texts = [(family, text) for family, each in load_texts(50).items() for text in each[-options.texts :]]
        rows = [Row(number, text, {"task": family}) for number, (family, text) in enumerate(texts)]
    for task in {row.labels["task"] for row in rows}:
        one = [row for row in rows if row.labels["task"] == task]
        for a, b in zip(one[::2], one[1::2], strict=False):
            a.labels["pair"] = b.labels["pair"] = str(a.number)
    return rows


def checkpoints(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """Stage, model and tokenizer of each: loaded, or one small model before, between and after two trainings."""
    if options.models:
        wrong = [path for path in options.models if not (path / "config.json").is_file()]
        if wrong:
            raise ValueError(f"--models: expected checkpoint directories with a config.json, got {wrong[0]}.")
        yield from ((stage, *shared.load(options, path)) for stage, path in zip(STAGES, options.models, strict=True))
        return
    model, tokenizer = shared.load(options)
    learned = lessons(options.length)
    for stage in STAGES:
        if stage in learned:
            shared.switch(model, shared.ways(options)[-1])
            plan = Plan(options.steps, options.batch, learning_rate=1e-3, checkpointing=False, bf16=False)
            losses = train(model, learned[stage], plan, pad=PAD, title=stage).losses
            print(f"{stage}: loss {losses[0]:.2f} to {losses[-1]:.2f} nats in {len(losses)} steps", flush=True)
        yield stage, model.eval(), tokenizer


def lessons(length: int) -> dict[str, list[Sample]]:
    """What the small model learns in a stage: the texts of cpt.py in pieces, the answers to "which kind" of sft.py."""
    texts = (text for each in cpt.texts().values() for text in each)
    made = {"cpt": [piece for text in texts for piece in chunks([BOS, *byte_ids(text)], length)], "sft": []}
    for one in sft.kinds("train"):
        asked, answer = [BOS, *byte_ids(one.prompt)], [*byte_ids(f" {one.answer}"), EOS]
        made["sft"].append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})
    return made


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts to token ids, behind a BOS if the tokenizer has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return lambda texts: [begin + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def trace_families(
    model: Any, encode: Any, rows: list[Row], stage: str, way: str, options: argparse.Namespace, measured: Any
) -> Run:
    """A run in OUT/traces/WAY/STAGE; what tracing took is added to `measured`."""
    path, device = options.out / "traces" / way / stage, next(model.parameters()).device
    name = str(options.models[STAGES.index(stage)]) if options.models else f"small model, {stage}"
    size = {"max_length": options.length, "batch_tokens": options.batch * options.length, "segment_tokens": SHARD}

    def traced() -> None:
        begin = time.perf_counter()
        tracer = trace_texts(model, encode, rows, path, progress=True, meta={"model": name}, **size)
        measured.seconds += time.perf_counter() - begin
        measured.tokens += tracer.tokens

    with torch.no_grad():
        model(torch.tensor(encode([rows[0].text]), device=device)[:, : options.length])  # what a process needs once
    measured.peak = max(peak_bytes(traced, device) or 0, measured.peak or 0) or None
    return omnigene_fast.open_trace(path)


def differentiation(runs: list[Run], options: argparse.Namespace, results: shared.Results) -> None:
    """A table and a picture of how differently the families are routed, by layer and stage."""
    figure, axes = shared.axes()
    rows: dict[Any, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        table = analysis.differentiation(run, permutations=options.permutations)
        table["noise"] = table["floor_95"] - table["floor"]  # that of uncorrected values, less their bias
        for row in table.to_dict("records"):
            line = rows.setdefault(row["layer"], {"layer": row["layer"]})
            line[run.name] = f"{row['corrected']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
            line[f"{run.name} floor"] = f"{row['noise']:.4f}"
        table = table[table["layer"] != "mean"]
        layers = table["layer"].astype(float) + (number - 1) / 12  # beside each other
        ends = (table["corrected"] - table["low"], table["high"] - table["corrected"])
        axes.errorbar(layers, table["corrected"], ends, color=f"C{number}", label=run.name, capsize=2)
        axes.plot(layers, table["noise"], "--", color=f"C{number}", linewidth=1)
    axes.set(xlabel="layer", ylabel="divergence of families (nats)", ylim=(0, None), xticks=runs[0].layers)
    axes.legend(title="dashed: noise floor")
    results.table(
        "How differently the families are routed",
        list(rows.values()),
        "Jensen-Shannon divergence in nats (at most ln 2 = 0.693), mean over pairs of families, corrected, with 95 %"
        " intervals;\n  floor: what it stays below in 95 % of the cases if the families do not differ.",
    )
    results.picture(figure, "stages", "Divergence of families, corrected, with 95 % intervals; dashed: noise floors.")


def compare(traced: dict[str, list[Run]], measured: dict[str, Any], results: shared.Results) -> None:
    """Tables of the trace by hooks on the stock model beside that of the gate: what it takes, what it records."""
    results.table("Tracing the families", shared.side_by_side(measured))
    rows = []
    for stock, ours in zip(*traced.values(), strict=True):
        table = analysis.replay_distance(stock, ours)
        number, other = int(table["tokens"].sum()), round(float((table["differing"] * table["tokens"]).sum()))
        rows.append({"stage": ours.name, "token and layer": number, "other experts": other})
        first = table["differing"].iloc[0]
        rows[-1] |= {"same set": f"{1 - other / number:.4%}", "in the first layer": f"{1 - first:.4%}"}
    results.table(
        "Experts recorded by hooks on the stock model and by the gate of the accelerated one",
        rows,
        f"In {ours.meta['dtype']}. Two experts that are nearly equal change places by rounding, in bfloat16 far more"
        " often than in float32;\n  what follows differs then, and so does more from layer to layer.",
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__ or "", "audit", batch=12)
    add = parser.add_argument
    add("--models", nargs=3, type=Path, metavar=("BASE", "CPT", "SFT"), help="checkpoint directories with tokenizers")
    add("--data", type=Path, help="JSON lines to trace instead of the families")
    add("--text-col", default="text", help="column with the text (default: text)")
    add("--label-col", default="task", help="column with the kind of sequence (default: task)")
    add("--length", type=shared.positive, help="tokens of a text (default: 1024 with --models, else 128)")
    add("--texts", type=int, default=16, help="of each family that are audited, 2 to 16 (default: 16)")
    add("--pairs", type=int, default=60, help="homology prompts of each answer, at least 4 (default: 60)")
    add("--steps", type=shared.positive, default=60, help="of each training of the small model (default: 60)")
    add("--permutations", type=shared.positive, default=1000, help="for noise floors and p-values (default: 1000)")
    options = parser.parse_args(argv)
    options.length = options.length or (1024 if options.models else 128)
    if not 2 <= options.texts <= 50 - cpt.TRAINED:
        parser.error(f"--texts: expected 2 to {50 - cpt.TRAINED}, got {options.texts}")
    if options.pairs < 4:
        parser.error(f"--pairs: expected at least 4, got {options.pairs}")
    if options.model:
        raise ValueError(f"--model: expected --models BASE CPT SFT, a checkpoint of each stage, got {options.model}.")
    return options


if __name__ == "__main__":
    shared.script("audit", main)
