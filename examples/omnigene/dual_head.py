"""3Di and DSSP of every residue from the sequence, by heads on the last hidden state, trained beside the language loss.

    python examples/omnigene/dual_head.py                    a small random model, trained on half of the superfamilies
    python examples/omnigene/dual_head.py --compare          with and without the accelerator, side by side
    python examples/omnigene/dual_head.py --model CKPT --steps 2000 --dtype bfloat16

A sample is a domain's sequence, one token per residue, and behind it one of its two structure strings as the answer,
of which the language loss is, as in OmniGene-4's SFT v5. The heads read the tokens of the sequence, before any label;
the paper's read those of the answer, where a class can be copied. Loss: half language, half heads; LoRA as in
train_lora.py. Accuracy is that on other superfamilies than were trained on.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measures
import numpy as np
import shared
import torch
import train_lora
from shared import ACCELERATED, STOCK, Domain
from torch import Tensor

from omnigene_fast.demo.training import IGNORED, Plan, Run, Sample, collate, train
from omnigene_fast.heads import TRACKS, DualHead, ResidueHeads, last_hidden_state

PROMPT, CUES = "### Protein:\n", {"3di": "\n\n### 3Di:\n", "dssp": "\n\n### DSSP:\n"}
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
LONGEST = 200  # residues of a domain in the data, at most
NOTE = "low, high: 95 %, superfamilies as the unit. gain: beyond the lookup. A residue sees what is before it, no more."

Classes = dict[str, np.ndarray]  # track -> class of every residue, domain after domain


def main(argv: Sequence[str] | None = None) -> None:
    """Train the heads with the model, and alone; measure both beside what needs no model."""
    options = arguments(argv)
    shared.need("matplotlib")
    shared.start(options)
    path, ways = shared.checkpoint(options), shared.ways(options)
    tokenizer = train_lora.load_tokenizer(path)
    trained, tested = shared.split_domains("train"), shared.split_domains("test")[: options.limit]
    answered = [sample(domain, tokenizer, list(CUES)[n % 2]) for n, domain in enumerate(trained)]
    bare, test = ([sample(domain, tokenizer) for domain in some] for some in (trained, tested))
    size, pad = options.batch, tokenizer.pad_token_id
    batches = [collate(test[at : at + size], pad) for at in range(0, len(test), size)]
    results = shared.Results(options, "Structure of every residue, from sequence", (__doc__ or "").split("\n\n")[2])

    # A control: what can be read from a model that has not learned it. Every model is let go before the next is made.
    alone, _ = fit(path, bare, options, pad, ways[-1], alone=True)
    heads = {"heads, model as it was": joined([predicted(alone, batch) for batch in batches])}
    alone, runs = None, {}
    for way in reversed(ways):  # accelerated first, as in train_lora
        dual = None
        dual, runs[way] = fit(path, answered, options, pad, way)
        if len(runs) == 1:
            dual.heads.save(options.out / "heads.safetensors")
            dual.model.save_pretrained(options.out / "adapter")
            call, tokens = functools.partial(predicted, dual), lambda batch: int(batch["attention_mask"].sum())
            made = shared.each_way(dual.model, options, batches, call, tokens)
            same = {name: joined(each.values) for name, each in made.items()}
    heads["heads and LoRA"] = same[ways[-1]]

    figure, panels = shared.axes(11.5, 5.4, columns=2)
    for (track, letters), name, axis in zip(TRACKS.items(), ("3Di", "DSSP"), panels, strict=True):
        rows = scores(track, trained, tested, {who: each[track] for who, each in heads.items()})
        results.table(f"{name} of {len(tested)} domains, {sum(len(d.sequence) for d in tested):,} residues", rows, NOTE)
        counts = measures.confusion(classes(tested, track), same[ways[-1]][track], len(letters), len(letters))
        measures.draw_confusion(axis, counts, letters, f"{name}: of each true class, % predicted as")
    results.picture(figure, "dual_head", "Heads and LoRA: where the residues of each class go, the commonest first.")
    rows = shared.side_by_side({way: runs[way] for way in ways})
    rows = [row | {f"{at} loss": runs[row["way"]].losses[n] for at, n in (("first", 0), ("last", -1))} for row in rows]
    note = shared.check_losses(results, runs, dtype := shared.dtype_of(options, path))
    if options.compare:  # the last one trained is stock
        trained_apart = {STOCK: joined([predicted(dual, batch) for batch in batches]), ACCELERATED: same[ACCELERATED]}
        note += differences(results, same, trained_apart, dtype)
    results.table("Training", rows, note)
    results.table("Measuring", shared.side_by_side(made))
    results.save()


def sample(domain: Domain, tokenizer: Any, answer: str | None = None) -> Sample:
    """A domain's sequence, letter by letter, and its structure string of track `answer` behind it, with all labels."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids += tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    begin = len(ids)
    ids += [residue(letter, tokenizer) for letter in domain.sequence]
    learned: list[int] = []
    if answer is not None:
        ids += tokenizer(CUES[answer], add_special_tokens=False)["input_ids"]
        learned = [*tokenizer(domain.tracks[answer], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    made = {"input_ids": ids + learned, "labels": [IGNORED] * len(ids) + learned}
    for track in TRACKS:
        made[f"labels_{track}"] = [IGNORED] * len(made["labels"])
        made[f"labels_{track}"][begin : begin + len(domain.sequence)] = classes([domain], track).tolist()
    return made


@functools.cache
def residue(letter: str, tokenizer: Any) -> int:
    """The token of one amino acid; ValueError if the tokenizer has none."""
    ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"--model: expected a tokenizer with one token per amino acid, got {ids} for {letter!r}.")
    return int(ids[0])


def fit(
    path: Path, samples: list[Sample], options: argparse.Namespace, pad: int, way: str, alone: bool = False
) -> tuple[DualHead, Run]:
    """New heads on the checkpoint, trained with the LoRA of train_lora.py, or `alone` on the frozen model."""
    dtype = shared.dtype_of(options, path)
    recipe = vars(options) | {"model": path, "dtype": dtype, "alpha": 2 * options.rank, "experts": "frozen"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shared.switch(train_lora.build_model(argparse.Namespace(**recipe), device, accelerated=False), way)
    if alone:
        model.requires_grad_(False)
    dual = DualHead(model, ResidueHeads(model.config.get_text_config().hidden_size, device=device), 1 if alone else 0.5)
    bf16, liger = dtype == "bfloat16", train_lora.fused_loss(model, device)
    plan = Plan(options.steps, options.batch, learning_rate=options.lr, bf16=bf16, liger=liger, seed=options.seed)
    run = train(dual, samples, plan, pad=pad, title="heads alone" if alone else way)
    return dual.eval(), run


@torch.no_grad()
def predicted(dual: DualHead, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class [n] of each residue of a batch, per track; RuntimeError where a score is not finite."""
    inputs = {name: batch[name].to(dual.model.device) for name in ("input_ids", "attention_mask")}
    with last_hidden_state(dual.model) as hidden:
        dual.model(**inputs, logits_to_keep=1, use_cache=False)
    found = {name: each.cpu()[batch[f"labels_{name}"] != IGNORED] for name, each in dual.heads(hidden()).items()}
    if not all(each.isfinite().all() for each in found.values()):
        raise RuntimeError("heads: expected finite scores of every residue, got others; train with a lower --lr.")
    return {track: each.argmax(-1) for track, each in found.items()}


def joined(batches: Sequence[dict[str, Tensor]]) -> Classes:
    """What `predicted` gave for all batches."""
    return {track: torch.cat([each[track] for each in batches]).numpy() for track in TRACKS}


def classes(some: Sequence[Domain], track: str) -> np.ndarray:
    """The true classes of all residues of `some` domains."""
    return np.array([TRACKS[track].index(letter) for domain in some for letter in domain.tracks[track]])


def scores(track: str, trained: Sequence[Domain], tested: Sequence[Domain], heads: Classes) -> list[dict[str, Any]]:
    """Rows of a table: what chance, the commonest class, a lookup by amino acid and the heads get right."""
    before, truth, letters = classes(trained, track), classes(tested, track), TRACKS[track]
    share = np.bincount(before, minlength=len(letters)) / len(before)
    acids = [np.array([AMINO_ACIDS.index(x) for one in some for x in one.sequence]) for some in (trained, tested)]
    table = measures.confusion(acids[0], before, len(AMINO_ACIDS), len(letters))
    lookup = (table + share).argmax(1)[acids[1]]  # an amino acid never seen gets the commonest class
    groups = np.unique([domain.superfamily for domain in tested for _ in domain.sequence], return_inverse=True)[1]

    def row(name: str, right: np.ndarray, guess: np.ndarray | None = None) -> dict[str, Any]:
        made = {"": name} | dict(zip(("accuracy", "low", "high"), measures.clustered(right, groups), strict=True))
        if guess is not None:
            gain = measures.clustered(right.astype(float) - (lookup == truth), groups)
            made["macro F1"] = measures.macro_f1(measures.confusion(truth, guess, len(letters), len(letters)))
            made["gain"] = "" if guess is lookup else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)
        return made

    named = {f"commonest class, {letters[share.argmax()]}": np.full_like(truth, share.argmax())}
    named |= {"lookup by amino acid": lookup} | heads
    # A shift by the longest domain ends in another one (behind the last, a trained one), unrelated to this one.
    shifted = np.concatenate([truth, before])[LONGEST:][: len(truth)]
    elsewhere = row("the same, labels of another domain", list(heads.values())[-1] == shifted)
    chance = row("chance: classes by their frequency", share[truth])
    return [chance, *(row(name, guess == truth, guess) for name, guess in named.items()), elsewhere]


def differences(results: shared.Results, same: dict[str, Classes], apart: dict[str, Classes], dtype: str) -> str:
    """How many predictions differ; in float32, with the same weights, more than one in 10,000 (ties) are a fault."""
    differ = [sum(int((ways[STOCK][t] != ways[ACCELERATED][t]).sum()) for t in TRACKS) for ways in (same, apart)]
    total = sum(map(len, same[STOCK].values()))
    said = f" Of {total:,} predictions {differ[0]:,} differ with the same weights"
    if dtype == "float32" and differ[0] > total / 10_000:
        results.fault(f"predictions: expected the same with the same weights.{said}.")
    return f"{said}, {differ[1]:,} between the two trained models."


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__ or "", "dual_head", batch=4)
    add = parser.add_argument
    add("--steps", type=train_lora.positive, default=100, help="optimizer steps (default: %(default)s)")
    add("--rank", type=train_lora.positive, default=64, help="of LoRA; alpha is twice that (default: %(default)s)")
    add("--lr", type=float, help="learning rate (default: 2e-4; 1e-3 for the small model)")
    add("--limit", type=train_lora.positive, default=300, help="domains that are tested (default: %(default)s)")
    options = parser.parse_args(argv)
    options.lr = options.lr or (2e-4 if options.model else 1e-3)
    return options


if __name__ == "__main__":
    shared.script("dual_head", main)
