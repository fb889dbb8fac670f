"""What the scripts of this folder share: data, splits, a small checkpoint, batched answers, comparison, results.

Each script is one step of the OmniGene-4 workflow. All take `--model CHECKPOINT`; without it they make a small Gemma-4
MoE with byte tokens under `--out`, which is a checkpoint like any other, with a tokenizer. `--compare` does the work
with the accelerator and without it, `--stock` without it alone.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnigene_fast
from omnigene_fast.bench.memory import peak_bytes
from omnigene_fast.demo.model import BOS, BYTES, EOS, PAD, Size, small_model
from omnigene_fast.demo.training import join, wait

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for train_lora, the recipe that the scripts build on

SMALL = Size(H=192, I=64, E=32, K=4, layers=4)
STOCK, ACCELERATED = "stock", "accelerated"


@dataclass(frozen=True)
class Domain:
    """A protein domain: sequence, 3Di and DSSP string of one length, CATH superfamily."""

    name: str
    superfamily: str
    sequence: str
    tracks: dict[str, str]  # "3di", "dssp"


@dataclass(frozen=True)
class Pair:
    """Two domains; `homologous` says whether they share a superfamily, `level` how hard that is to see."""

    level: str
    homologous: bool
    a: Domain
    b: Domain


@dataclass(frozen=True)
class Question:
    """A prompt with its answer; `group` names the row of the table that it counts for."""

    prompt: str
    answer: str
    group: str


@functools.cache
def domains() -> dict[str, Domain]:
    """The 1,440 domains of data/domains.tsv by name."""
    return {
        row["domain"]: Domain(row["domain"], row["cath"], row["seq"], {"3di": row["3di"], "dssp": row["dssp"]})
        for row in _rows("domains.tsv")
    }


@functools.cache
def pairs() -> list[Pair]:
    """The 720 pairs of data/homology_pairs.tsv."""
    known = domains()
    rows = _rows("homology_pairs.tsv")
    return [Pair(row["level"], row["label"] == "1", known[row["a"]], known[row["b"]]) for row in rows]


@functools.cache
def training_superfamilies() -> frozenset[str]:
    """Half of the superfamilies, chosen so that few pairs join one of them with one of the others.

    Negative pairs tie superfamilies together; Kernighan and Lin's bisection cuts few of these ties. A pair with one
    domain on either side belongs to neither part.
    """
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(sorted({domain.superfamily for domain in domains().values()}))
    graph.add_edges_from((pair.a.superfamily, pair.b.superfamily) for pair in pairs() if not pair.homologous)
    return frozenset(networkx.algorithms.community.kernighan_lin_bisection(graph, seed=1)[0])


def split_pairs(part: str) -> list[Pair]:
    """The pairs of "train" or "test", both of whose superfamilies are in that part."""
    return [pair for pair in pairs() if {_part(pair.a), _part(pair.b)} == {part}]


def split_domains(part: str) -> list[Domain]:
    """The domains of "train" or "test"."""
    return [domain for domain in domains().values() if _part(domain) == part]


def _part(domain: Domain) -> str:
    return "train" if domain.superfamily in training_superfamilies() else "test"


def by_hash(key: str) -> str:
    """ "train" or "test" for anything with a name, half and half."""
    return "train" if hashlib.sha256(key.encode()).digest()[0] % 2 else "test"


def _rows(name: str) -> list[dict[str, str]]:
    with (HERE / "data" / name).open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def parser(doc: str, out: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every script has; `defaults` replace theirs."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--model", type=Path, help="Gemma-4 MoE checkpoint with its tokenizer; a small one is made by default")
    ways = made.add_mutually_exclusive_group()
    ways.add_argument("--stock", action="store_true", help="without the accelerator")
    ways.add_argument("--compare", action="store_true", help="with the accelerator and without it, side by side")
    add("--batch", type=int, default=8, help="sequences of a batch (default: %(default)s)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as the checkpoint was saved")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, default=Path("out") / out, help="directory for everything made (default: %(default)s)")
    made.set_defaults(**defaults)
    return made


def start(options: argparse.Namespace) -> None:
    """What every script does first: threads, seed, its directory."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: expected a directory, got {options.out}.")
    options.out.mkdir(parents=True, exist_ok=True)


def ways(options: argparse.Namespace) -> tuple[str, ...]:
    """The ways in which the work is to be done."""
    return (STOCK, ACCELERATED) if options.compare else (STOCK,) if options.stock else (ACCELERATED,)


def tuning(made: argparse.ArgumentParser, steps: int) -> None:
    """Add the options of `tuned`; `steps` is what the small model gets by default."""
    made.add_argument("--steps", type=int, help=f"training steps before (default: {steps}; with --model none)")
    made.add_argument("--lr", type=float, help="learning rate (default: 2e-4; 2e-3 for the small model)")
    made.set_defaults(small_steps=steps)


def need(module: str, package: str | None = None) -> None:
    """ImportError with the command that installs `module`, if it is missing."""
    package_of = module.partition(".")[0]  # find_spec raises where a dotted name's parent is missing
    if importlib.util.find_spec(package_of) is None or importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed; install it with: pip install {package or module}")


def program(name: str, package: str) -> str:
    """The path of a command; RuntimeError with the command that installs it, if it is missing."""
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not on the PATH; install it with: apt-get install {package}")
    return found


def script(name: str, main: Callable[[], object]) -> None:
    """Run `main`; what the user can mend ends the script with one sentence."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT reads a renamed attribute
    try:
        main()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"{name}: " + " ".join(str(error).split()))


def checkpoint(options: argparse.Namespace) -> Path:
    """--model, or a small random checkpoint in OUT/base, made if it is not there; ValueError if it holds none."""
    if options.model is None:
        path = options.out / "base"
        if join()[0] == 0 and not (path / "config.json").is_file():
            save(small_model(SMALL, torch.device("cpu"), options.seed)[0].float(), byte_tokenizer(), path)
        wait()  # under torchrun the first process makes it
        return path
    if not (options.model / "config.json").is_file():
        raise ValueError(f"--model: expected a checkpoint directory with a config.json, got {options.model}.")
    return options.model


def load(options: argparse.Namespace, path: Path | None = None) -> tuple[Any, Any]:
    """The stock model of `path` (default: `checkpoint(options)`) in eval mode on the GPU, if there is one, and its
    tokenizer, which pads on the left."""
    from transformers import AutoModelForCausalLM

    path = checkpoint(options) if path is None else path
    tokenizer = load_tokenizer(path)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint, which pads on the left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a checkpoint that `load` reads; beside its place first, so that a directory is whole or not there."""
    beside = path.with_name(path.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


def byte_tokenizer(specials: Sequence[str] = ()) -> Any:
    """A tokenizer of UTF-8 bytes: ids 0 to 2 are <pad>, <eos>, <bos>, byte b is 3 + b, `specials` follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS}
    vocabulary |= {letter: BYTES + byte for byte, letter in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


def switch(model: Any, way: str) -> Any:
    """The same model, accelerated or stock again, in place."""
    return omnigene_fast.accelerate(model) if way == ACCELERATED else omnigene_fast.restore(model)


def prompt_batches(
    tokenizer: Any, questions: Sequence[Question], size: int, device: torch.device
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Questions as batches, longest first, padded on the left: (numbers of the questions, the model's inputs)."""
    ids = [prompt_ids(tokenizer, question.prompt) for question in questions]
    order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
    return [
        (numbers, padded([ids[n] for n in numbers], tokenizer.pad_token_id, device))
        for numbers in (order[at : at + size] for at in range(0, len(order), size))
    ]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids behind the begin-of-sequence token, where the tokenizer has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Token ids [B, S] padded on the left, with mask and positions: the last column is the last token of every row."""
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    rows = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def first_tokens(tokenizer: Any, answers: Sequence[str]) -> list[int]:
    """The first token of each answer; ValueError unless they differ, because a prefill sees that one alone."""
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
    if len(set(first)) < len(first):
        raise ValueError(f"answers: expected another first token of each, got {', '.join(map(repr, answers))}.")
    return first


def margins(model: Any, inputs: dict[str, Tensor], first: Sequence[int]) -> Tensor:
    """Logit of the first answer less that of the second, [B] float32: above 0 the model answers the first.

    One prefill without a generation loop: the logits of the last position are those that `generate` would take.
    """
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return (logits[:, first[0]] - logits[:, first[1]]).cpu()


def generated(model: Any, tokenizer: Any, inputs: dict[str, Tensor], tokens: int) -> list[str]:
    """What greedy `generate` says after each prompt."""
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def tuned(options: argparse.Namespace, questions: Sequence[Question], results: "Results") -> tuple[Any, Any]:
    """The model and the tokenizer of `load`, after --steps steps of LoRA on the answers to `questions`.

    The recipe is that of train_lora, its adapters merged at the end. With --compare two models are trained from the
    same seeds; their losses go into a table, and the accelerated one is returned.
    """
    steps = options.steps if options.steps is not None else 0 if options.model else options.small_steps
    if steps <= 0:
        return load(options)
    need("peft")
    import train_lora
    from transformers import AutoConfig

    from omnigene_fast.demo.training import IGNORED, Plan, train

    path = checkpoint(options)
    tokenizer = load_tokenizer(path)
    samples = []
    for question in questions:
        prompt = prompt_ids(tokenizer, question.prompt)
        answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        samples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    dtype = options.dtype
    if dtype == "auto":
        dtype = str(AutoConfig.from_pretrained(path).get_text_config().dtype or torch.float32).removeprefix("torch.")
    recipe = argparse.Namespace(
        model=path,
        dtype=dtype,
        seed=options.seed,
        rank=64,
        alpha=128,
        save="preactivation",
        expert_lora=False,
        experts="frozen",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs: dict[str, Any] = {}
    model = None
    for way in ways(options):
        model = None  # the one before goes first: two of them need not fit
        model = train_lora.build_model(recipe, device, accelerated=way == ACCELERATED)
        plan = Plan(
            steps=steps,
            batch=options.batch,
            # At 5e-3 the small model magnifies rounding: after 40 steps the two ways' losses were 5 % apart.
            learning_rate=options.lr or (2e-4 if options.model else 2e-3),
            bf16=dtype == "bfloat16",
            liger=train_lora.fused_loss(model, device),
            seed=options.seed,
        )
        runs[way] = train(model, samples, plan, pad=tokenizer.pad_token_id, title=f"training, {way}")
    results.table(
        "Training on the answers",
        [{**row, "last loss": runs[row["way"]].losses[-1]} for row in side_by_side(runs)],
        f"{len(samples)} questions, {steps} steps of {options.batch}; the loss is that of the answer's tokens alone."
        + loss_differences(runs),
    )
    return switch(model, STOCK).merge_and_unload().eval(), tokenizer


def loss_differences(runs: dict[str, Any]) -> str:
    """How far the losses of two ways are apart, as a sentence; nothing where there is one way."""
    if len(runs) < 2:
        return ""
    both = zip(runs[STOCK].losses, runs[ACCELERATED].losses, strict=True)
    apart = [abs(ours - stock) / max(abs(stock), 1e-12) for stock, ours in both]
    return (
        f" Losses differ by at most {max(apart[:10]):.1e} in the first ten steps, {max(apart):.1e} in all (relative)."
    )


def asked(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    words: tuple[str, str],
    options: argparse.Namespace,
    results: "Results",
) -> tuple[list[float], float]:
    """The margin of the first of two answers over the second for every question, and the seconds that it took.

    The margins come from one prefill a batch. Tables show the ways side by side, and what `generate` says and takes.
    """
    from tqdm import tqdm

    first = first_tokens(tokenizer, words)
    batches = prompt_batches(tokenizer, questions, options.batch, next(model.parameters()).device)
    order = [number for numbers, _ in batches for number in numbers]

    def tokens(batch: Any) -> int:
        return int(batch[1]["attention_mask"].sum())

    made = each_way(model, options, batches, lambda batch: margins(model, batch[1], first), tokens)
    found = {
        way: torch.empty(len(order)).index_copy(0, torch.tensor(order), torch.cat(one.values))
        for way, one in made.items()
    }
    note = ""
    if len(found) == 2:
        same = int(((found[STOCK] > 0) == (found[ACCELERATED] > 0)).sum())
        apart = (found[STOCK] - found[ACCELERATED]).abs().max().item()
        largest = found[STOCK].abs().max().item()
        note = f"Answers equal: {same} of {len(order)}; margins up to {largest:.3g} differ by at most {apart:.1e}."
    results.table(f"{len(order)} questions, one prefill each", side_by_side(made), note)

    way, prefill = list(made.items())[-1]
    longest = 1 + max(len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words)
    texts: dict[int, str] = {}
    spent = {"one prefill": 0.0, f"generate, {longest} tokens": 0.0}
    calls = (lambda inputs: margins(model, inputs, first), lambda inputs: generated(model, tokenizer, inputs, longest))
    calls[1](batches[0][1])  # warms up
    for numbers, inputs in tqdm(batches, desc="prefill and generate", unit="batch"):
        for name, call in zip(spent, calls, strict=True):
            begin = _now(inputs["input_ids"].device)
            said = call(inputs)
            spent[name] += _now(inputs["input_ids"].device) - begin
        texts |= dict(zip(numbers, (text.strip() for text in said), strict=True))
    valid = [number for number, text in texts.items() if text.startswith(words)]
    agree = sum(texts[number].startswith(words[found[way][number].item() <= 0]) for number in valid)
    rows: list[dict[str, Any]] = [{"answers by": name, "seconds": seconds} for name, seconds in spent.items()]
    rows[1] |= {"to the prefill": f"{rows[1]['seconds'] / rows[0]['seconds']:.2f}x"}
    rows[0] |= {"valid": f"{len(order)} of {len(order)}"}
    rows[1] |= {"valid": f"{len(valid)} of {len(order)}", "same answer": f"{agree} of {len(valid)}"}
    note = f"Both {way}, in turn, in batches of {options.batch}; valid: the text begins with {' or '.join(words)}."
    results.table("One prefill against generate", rows, note)
    return found[way].tolist(), prefill.seconds


@dataclass
class Measured:
    """What one way of doing the work took, and what came of it, batch by batch."""

    values: list[Any] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak: int | None = None  # bytes beyond the model's own, for the first batch

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else math.nan


def each_way(
    model: Any,
    options: argparse.Namespace,
    batches: Sequence[Any],
    call: Callable[[Any], Any],
    count: Callable[[Any], int],
) -> dict[str, Measured]:
    """`call` on every batch in every way of `options`, in turn, so that a busy machine slows all alike.

    One model does both: accelerated and restored in place. The first batch, the longest by `prompt_batches`, is run
    twice before: to warm up, and to measure memory. `count` says how many tokens a batch has, padding left out.
    """
    from tqdm import tqdm

    made = {way: Measured() for way in ways(options)}
    device = next(model.parameters()).device
    for way, one in made.items():
        switch(model, way)
        call(batches[0])
        one.peak = peak_bytes(functools.partial(call, batches[0]), device)
    for batch in tqdm(batches, desc=" and ".join(made), unit="batch"):
        for way, one in made.items():
            switch(model, way)
            begin = _now(device)
            one.values.append(call(batch))
            one.seconds += _now(device) - begin
            one.tokens += count(batch)
    return made


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def side_by_side(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table: tokens/s and peak memory of each way, and the ratio to stock if there are two.

    Takes `Measured` and the `Run` of a training alike.
    """
    rows = []
    for way, one in made.items():
        peak = None if one.peak is None else round(one.peak / 1e6, 1)
        rows.append({"way": way, "tokens/s": round(one.speed, 1), "peak MB beyond the model": peak})
        if STOCK in made and way != STOCK:
            rows[-1]["speed-up"] = f"{one.speed / made[STOCK].speed:.2f}x"
    return rows


def accuracy(right: Iterable[bool]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval (Wilson) and their number."""
    from scipy.stats import binomtest

    each = [bool(one) for one in right]
    interval = binomtest(sum(each), len(each)).proportion_ci(method="wilson")
    return {"accuracy": sum(each) / len(each), "low": interval.low, "high": interval.high, "n": len(each)}


def clustered(values: Any, groups: Any) -> tuple[float, float, float]:
    """Mean of values [N] with its 95 % interval where groups [N] of ids from 0 are drawn as wholes.

    The mean is a ratio, sum over size, linearised; its error comes from the groups' totals alone, so that values may
    depend on each other inside a group.
    """
    values, groups = torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(groups)
    mean = values.mean()
    totals = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, values - mean)
    margin = 1.96 * (len(totals) / max(1, len(totals) - 1) * totals.square().sum()).sqrt() / len(values)
    return mean.item(), (mean - margin).item(), (mean + margin).item()


def confusion(true: Any, predicted: Any, rows: int, columns: int) -> Any:
    """How often class `true` [N] met class `predicted` [N], as a numpy array [rows, columns]."""
    import numpy

    return numpy.bincount(true * columns + predicted, minlength=rows * columns).reshape(rows, columns)


def draw_confusion(axis: Any, counts: Any, names: Sequence[str], title: str) -> None:
    """A confusion matrix [classes, classes] as percentages of its rows, the commonest class first."""
    order = (-counts.sum(1)).argsort(kind="stable")
    percent = (100 * counts / counts.sum(1, keepdims=True).clip(min=1))[order][:, order]
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for y, row in enumerate(percent):
        for x, value in enumerate(row):
            if value >= 9.5:
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", size=8, color="w" if value > 50 else "k")
    axis.set(xlabel="predicted", ylabel="true", title=title)
    axis.set_xticks(range(len(names)), [names[n] for n in order])
    axis.set_yticks(range(len(names)), [names[n] for n in order])


def auc(positive: Sequence[float], negative: Sequence[float]) -> dict[str, float]:
    """Area under the ROC curve, ties counted half, with its 95 % interval.

    DeLong's (1988); where all positives are above all negatives, or below, and it has no width, Newcombe's (2006,
    method 5); NaN where neither exists.
    """
    above = torch.tensor(positive, dtype=torch.float64)[:, None]
    below = torch.tensor(negative, dtype=torch.float64)[None]
    wins = (above > below).double() + (above == below).double() / 2  # [positives, negatives]
    value = wins.mean().item()
    spread = math.nan  # of one pair's score nothing is known
    if min(wins.shape) > 1:
        spread = wins.mean(1).var().item() / len(positive) + wins.mean(0).var().item() / len(negative)
    low = high = math.nan
    if spread > 0:
        low, high = max(value - 1.96 * math.sqrt(spread), 0.0), min(value + 1.96 * math.sqrt(spread), 1.0)
    elif value in (0.0, 1.0):
        low, high = sorted((value, abs(value - _newcombe(len(positive), len(negative)))))
    return {"auc": value, "auc low": low, "auc high": high}


def _newcombe(positives: int, negatives: int) -> float:
    """How far below 1 the AUC may be, though the scores show 1."""
    size = (positives + negatives) / 2 - 1

    def beyond(area: float) -> bool:
        factor = 1 + size * ((1 - area) / (2 - area) + area / (1 + area))
        return (1 - area) ** 2 > 1.96**2 * area * (1 - area) * factor / (positives * negatives)

    low, high = 0.0, 1.0  # beyond holds at the first and not at the second
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) else (low, middle)
    return 1 - low


class Results:
    """What a script leaves for people: tables that it prints, pictures, links; `index.py` makes one page of them."""

    def __init__(self, options: argparse.Namespace, title: str, about: str) -> None:
        self.out: Path = options.out
        self.content: dict[str, Any] = {"title": title, "about": about, "command": sys.argv, "parts": []}

    def table(self, title: str, rows: Any, note: str = "") -> None:
        """Print rows (dicts or a pandas table) and keep them."""
        rows = rows if isinstance(rows, list) else rows.to_dict("records")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = [[shown(row.get(name, "")) for name in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
        print(f"\n{title}\n")
        for line in (columns, *text):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if note:
            print(f"\n  {note}")
        sys.stdout.flush()
        self.content["parts"].append({"kind": "table", "title": title, "columns": columns, "rows": text, "note": note})

    def picture(self, figure: Any, name: str, caption: str) -> None:
        """Keep a matplotlib figure as NAME.png."""
        figure.savefig(self.out / f"{name}.png", dpi=110)
        print(f"\npicture: {self.out / name}.png")
        self.content["parts"].append({"kind": "picture", "file": f"{name}.png", "caption": caption})

    def link(self, path: Path, text: str) -> None:
        """Point to another file under --out."""
        print(f"\n{text}: {path}")
        self.content["parts"].append({"kind": "link", "file": str(path.relative_to(self.out)), "text": text})

    def save(self) -> None:
        """Write result.json, which says that the script came to its end."""
        beside = self.out / "result.json.new"
        beside.write_text(json.dumps(self.content, indent=1, default=str))
        beside.rename(self.out / "result.json")


def shown(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def axes(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    """Figure and axes of matplotlib, drawn without a display; an array of axes if there are several columns."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
