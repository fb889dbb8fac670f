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

import numpy as np
import shared
import torch
import train_lora
from shared import ACCELERATED, STOCK, Domain
from transformers import AutoConfig

from omnigene_fast.demo.training import IGNORED, Plan, Run, Sample, collate, train
from omnigene_fast.heads import TRACKS, DualHead, ResidueHeads, last_hidden_state

PROMPT, CUES = "### Protein:\n", {"3di": "\n\n### 3Di:\n", "dssp": "\n\n### DSSP:\n"}
NAMES = {"3di": "3Di", "dssp": "DSSP"}
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
LONGEST = 200  # residues of a domain in the data, at most
NOTE = (
    "low, high: 95 %, superfamilies as the unit. gain: accuracy beyond the lookup, on the same residues. The model is"
    " causal: a residue's hidden state knows what is before it, nothing behind it."
)

Predicted = dict[str, np.ndarray]  # track -> class ids of all residues, domain after domain


def main(argv: Sequence[str] | None = None) -> None:
    """Train the heads with the model, and alone; measure both beside what needs no model."""
    options = arguments(argv)
    shared.need("matplotlib")
    shared.start(options)
    path = shared.checkpoint(options)
    tokenizer = train_lora.load_tokenizer(path)
    trained, tested = shared.split_domains("train"), shared.split_domains("test")[: options.limit]
    samples = [sample(domain, tokenizer, list(CUES)[n % 2]) for n, domain in enumerate(trained)]
    batches = evaluation(tested, tokenizer, options.batch)
    results = shared.Results(options, "Structure of every residue, from sequence", (__doc__ or "").split("\n\n")[2])

    runs: dict[str, Run] = {}
    apart: dict[str, Predicted] = {}
    for way in shared.ways(options):
        dual = build(path, options, way)
        runs[way] = fit(dual, samples, options, tokenizer.pad_token_id, way)
        if options.compare:
            apart[way] = joined([predicted(dual, batch) for batch in batches])
    dual.heads.save(options.out / "heads.safetensors")
    dual.model.save_pretrained(options.out / "adapter")
    made = shared.each_way(
        dual.model,
        options,
        batches,
        functools.partial(predicted, dual),
        lambda batch: int(batch["attention_mask"].sum()),
    )
    both = {way: joined(each.values) for way, each in made.items()}
    alone = build(path, options, shared.ways(options)[-1])
    alone.model.requires_grad_(False)
    fit(alone, samples, options, tokenizer.pad_token_id, "heads alone")
    control = joined([predicted(alone, batch) for batch in batches])

    heads = both[shared.ways(options)[-1]]
    for track in TRACKS:
        rows = scores(
            track, trained, tested, {"heads, model as it was": control[track], "heads and LoRA": heads[track]}
        )
        results.table(f"{NAMES[track]}: {len(tested)} domains, {len(heads[track]):,} residues", rows, NOTE)
    results.picture(picture(tested, heads), "dual_head", "Heads and LoRA: where the residues of each class go.")
    results.table("Training", shared.side_by_side(runs), losses(runs))
    results.table("Measuring", shared.side_by_side(made), "" if not options.compare else equality(both, apart))
    results.save()


def sample(domain: Domain, tokenizer: Any, answer: str | None) -> Sample:
    """A domain's sequence, and its structure string of track `answer` behind it; labels for both losses.

    The sequence is encoded letter by letter, the rest as the tokenizer likes.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    begin += tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    ids = begin + [residue(letter, tokenizer) for letter in domain.sequence]
    made = {"input_ids": ids, "labels": [IGNORED] * len(ids)}
    if answer is not None:
        cue = tokenizer(CUES[answer], add_special_tokens=False)["input_ids"]
        text = [*tokenizer(domain.tracks[answer], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made = {"input_ids": ids + cue + text, "labels": [IGNORED] * len(ids + cue) + text}
    for track, letters in TRACKS.items():
        classes = [letters.index(letter) for letter in domain.tracks[track]]
        rest = len(made["input_ids"]) - len(ids)
        made[f"labels_{track}"] = [IGNORED] * len(begin) + classes + [IGNORED] * rest
    return made


@functools.cache
def residue(letter: str, tokenizer: Any) -> int:
    """The token of one amino acid; ValueError if the tokenizer has none."""
    ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"--model: expected a tokenizer with one token per amino acid, got {ids} for {letter!r}.")
    return int(ids[0])


def build(path: Path, options: argparse.Namespace, way: str) -> DualHead:
    """The checkpoint with the LoRA of train_lora.py, and new heads; the same weights for the same seed."""
    config = AutoConfig.from_pretrained(path)
    dtype = options.dtype if options.dtype != "auto" else str(config.dtype or torch.float32).removeprefix("torch.")
    recipe = {"model": path, "dtype": dtype, "seed": options.seed, "rank": options.rank, "alpha": 2 * options.rank}
    recipe |= {"expert_lora": False, "experts": "frozen", "save": "preactivation"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = train_lora.build_model(argparse.Namespace(**recipe), device, accelerated=way == ACCELERATED)
    return DualHead(model, ResidueHeads(config.get_text_config().hidden_size, device=device))


def fit(dual: DualHead, samples: list[Sample], options: argparse.Namespace, pad: int, title: str) -> Run:
    """Train what requires a gradient."""
    device = next(dual.parameters()).device
    plan = Plan(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.lr,
        bf16=next(dual.model.parameters()).dtype == torch.bfloat16,
        liger=train_lora.fused_loss(dual.model, device),
        seed=options.seed,
    )
    run = train(dual, samples, plan, pad=pad, title=title)
    dual.eval()
    return run


def evaluation(tested: Sequence[Domain], tokenizer: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """The sequences alone, in batches."""
    rows = [sample(domain, tokenizer, None) for domain in tested]
    return [collate(rows[at : at + size], tokenizer.pad_token_id) for at in range(0, len(rows), size)]


@torch.no_grad()
def predicted(dual: DualHead, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The class of each residue of a batch, per track [n]."""
    device = next(dual.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with last_hidden_state(dual.model) as hidden:
        dual.model(**inputs, logits_to_keep=1, use_cache=False)
    logits = dual.heads(hidden())
    return {track: each.argmax(-1).cpu()[batch[f"labels_{track}"] != IGNORED] for track, each in logits.items()}


def joined(batches: Sequence[dict[str, torch.Tensor]]) -> Predicted:
    """What `predicted` gave for all batches."""
    return {track: torch.cat([each[track] for each in batches]).numpy() for track in TRACKS}


def residues(some: Sequence[Domain], track: str) -> np.ndarray:
    """The classes of all residues of `some` domains, one domain after the other."""
    return np.array([TRACKS[track].index(letter) for domain in some for letter in domain.tracks[track]])


def scores(track: str, trained: Sequence[Domain], tested: Sequence[Domain], heads: Predicted) -> list[dict[str, Any]]:
    """Rows of a table: what chance, the commonest class, a lookup by amino acid and the heads get right."""
    before, after, classes = residues(trained, track), residues(tested, track), len(TRACKS[track])
    share = np.bincount(before, minlength=classes) / len(before)
    acids = [np.array([AMINO_ACIDS.index(x) for one in some for x in one.sequence]) for some in (trained, tested)]
    table = np.zeros((len(AMINO_ACIDS), classes)) + share  # an amino acid that was not seen: the commonest class
    np.add.at(table, (acids[0], before), 1)
    lookup = table.argmax(1)[acids[1]]
    families = [domain.superfamily for domain in tested for _ in domain.sequence]
    groups = np.unique(families, return_inverse=True)[1]

    def row(name: str, classes: np.ndarray, truth: np.ndarray = after) -> dict[str, Any]:
        right = (classes == truth).astype(float)
        gain, low, high = interval(right - (lookup == truth), groups)
        f1 = macro_f1(classes, truth)
        return {"": name} | accuracy(right) | {"macro F1": f1, "gain": f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"}

    def accuracy(right: np.ndarray) -> dict[str, float]:
        return dict(zip(("accuracy", "low", "high"), interval(right, groups), strict=True))

    commonest = int(share.argmax())
    last = list(heads)[-1]
    return [
        {"": "chance: classes by their frequency"} | accuracy(share[after]),
        row(f"commonest class, {TRACKS[track][commonest]}", np.full_like(after, commonest)),
        row("lookup by amino acid", lookup) | {"gain": ""},
        *(row(name, each) for name, each in heads.items()),
        # More residues further on is another domain: what is left of the accuracy there is not about this one.
        {"": f"{last}, labels of another domain"} | accuracy(heads[last] == np.roll(after, LONGEST)),
    ]


def interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Mean of values [N] with its 95 % interval, for groups [N] that are drawn as wholes (linearised ratio)."""
    mean = values.mean()
    totals = np.bincount(groups, weights=values - mean)
    margin = 1.96 * np.sqrt(len(totals) / max(1, len(totals) - 1) * (totals**2).sum()) / len(values)
    return float(mean), float(mean - margin), float(mean + margin)


def macro_f1(classes: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes that occur of their F1 score."""
    each = [2 * ((classes == c) & (truth == c)).sum() / ((classes == c).sum() + (truth == c).sum()) for c in set(truth)]
    return float(np.mean(each))


def picture(tested: Sequence[Domain], heads: Predicted) -> Any:
    """Confusion matrices, the commonest class first; a row adds up to 1."""
    figure, (left, right) = shared.axes(11.5, 5.2, columns=2)
    for axis, track in ((left, "3di"), (right, "dssp")):
        after, letters = residues(tested, track), TRACKS[track]
        counts = np.zeros((len(letters),) * 2)
        np.add.at(counts, (after, heads[track]), 1)
        order = np.argsort(-counts.sum(1), kind="stable")
        shares = (counts / counts.sum(1, keepdims=True).clip(min=1))[order][:, order]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [letters[n] for n in order]
        axis.set(xlabel="predicted", ylabel="true", title=NAMES[track])
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        for (y, x), value in np.ndenumerate(shares):
            if value >= 0.095:
                axis.text(
                    x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="w" if value > 0.5 else "k"
                )
    return figure


def losses(runs: dict[str, Run]) -> str:
    """What became of the loss, and how far apart the ways are."""
    first = next(iter(runs.values())).losses
    text = f"loss (half language, half heads): {first[0]:.4f} before the first step, {first[-1]:.4f} before the last"
    if len(runs) == 1:
        return text + "."
    apart = [abs(a - b) / abs(a) for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
    return f"{text}; largest relative difference {max(apart[:10]):.1e} in the first ten steps, {max(apart):.1e} in all."


def equality(same: dict[str, Predicted], apart: dict[str, Predicted]) -> str:
    """How many predictions differ between the ways."""
    total = sum(each.size for each in same[ACCELERATED].values())
    by = [sum(int((ways[STOCK][t] != ways[ACCELERATED][t]).sum()) for t in TRACKS) for ways in (same, apart)]
    return f"Of {total:,} predictions {by[0]:,} differ with the same weights, {by[1]:,} between the two trained models."


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__ or "", "dual_head")
    add = parser.add_argument
    add("--steps", type=train_lora.positive, default=150, help="optimizer steps (default: %(default)s)")
    add(
        "--rank", type=train_lora.positive, default=64, help="of LoRA, whose alpha is twice that (default: %(default)s)"
    )
    add("--lr", type=float, help="learning rate (default: 2e-4; 2e-3 for the random model)")
    add("--limit", type=train_lora.positive, help="domains that are tested (default: all 730)")
    options = parser.parse_args(argv)
    options.lr = options.lr or (2e-4 if options.model else 2e-3)
    return options


if __name__ == "__main__":
    shared.script("dual_head", main)
