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
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnigene_fast
from omnigene_fast.bench.memory import peak_bytes
from omnigene_fast.demo.model import BOS, BYTES, EOS, PAD, Size, small_model
from omnigene_fast.demo.training import Run, join, wait
from omnigene_fast.integrations.transformers import served

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
    need("networkx")
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
    add("--batch", type=positive, default=8, help="sequences of a batch (default: %(default)s)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as the checkpoint was saved")
    add("--seed", type=natural, default=0, help="of weights and order (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads")
    add("--out", type=Path, default=Path("out") / out, help="directory for everything made (default: %(default)s)")
    made.set_defaults(**defaults)
    return made


def start(options: argparse.Namespace) -> None:
    """What every script does first: threads, seed, its directory."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of weights that are read and written
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: expected a directory, got {options.out}.")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").unlink(missing_ok=True)  # an earlier run's, should this one fail before its Results


def ways(options: argparse.Namespace) -> tuple[str, ...]:
    """The ways in which the work is to be done."""
    return (STOCK, ACCELERATED) if options.compare else (STOCK,) if options.stock else (ACCELERATED,)


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


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return 0 if text == "0" else positive(text)


def script(name: str, main: Callable[[], object]) -> None:
    """Run `main`; what the user can mend ends the script with one sentence.

    With OMNIGENE_FAST_TRACEBACK set, as `run_all.py` does for its logs, where it came from is printed before.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT reads a renamed attribute
    try:
        main()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("OMNIGENE_FAST_TRACEBACK"):
            traceback.print_exc()
        sys.exit(f"{name}: " + " ".join(str(error).split()))


def checkpoint(options: argparse.Namespace) -> Path:
    """--model, or a small random checkpoint in OUT/base, made unless one of this seed and size is there.

    ValueError if --model holds no checkpoint, or OUT/base one that was not made here.
    """
    if options.model is None:
        path = options.out / "base"
        wanted = {"seed": options.seed, "size": asdict(SMALL)}
        if join()[0] == 0 and _made_of(path) != wanted:
            save(small_model(SMALL, torch.device("cpu"), options.seed)[0].float(), byte_tokenizer(), path, wanted)
        wait()  # under torchrun the first process makes it
        return path
    if not (options.model / "config.json").is_file():
        raise ValueError(f"--model: expected a checkpoint directory with a config.json, got {options.model}.")
    return options.model


def _made_of(path: Path) -> dict[str, Any] | None:
    """Seed and size of a checkpoint that `checkpoint` made; ValueError if it is someone else's, so that it stays."""
    if not (path / "config.json").is_file():
        return None
    if not (path / "made.json").is_file():
        raise ValueError(f"--out: expected in {path} what a script made, got another checkpoint; pass it as --model.")
    found: dict[str, Any] = json.loads((path / "made.json").read_text())
    return found


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


def save(model: Any, tokenizer: Any, path: Path, made: dict[str, Any] | None = None) -> None:
    """Write a checkpoint that `load` reads, and `made` as its made.json; beside its place first, so that a directory is
    whole or not there."""
    beside = path.with_name(path.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if made is not None:
        (beside / "made.json").write_text(json.dumps(made))
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


def padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Token ids [B, S] padded on the left, with mask and positions: the last column is the last token of every row."""
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    rows = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def switch(model: Any, way: str) -> Any:
    """The same model, accelerated or stock again, in place; RuntimeError if it is not what it was switched to."""
    (omnigene_fast.accelerate if way == ACCELERATED else omnigene_fast.restore)(model)
    ours, of = served(model)
    if ours != (of if way == ACCELERATED else 0) or not of:
        raise RuntimeError(f"model: expected it {way}, got {ours} of its {of} routers and experts accelerated.")
    return model


def dtype_of(options: argparse.Namespace, path: Path) -> str:
    """The name of the dtype to work in: --dtype, or for "auto" that in which the checkpoint `path` was saved (float32
    if it does not say)."""
    if options.dtype != "auto":
        return str(options.dtype)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    return str(config.dtype or config.get_text_config().dtype or torch.float32).removeprefix("torch.")


@dataclass
class Measured:
    """What one way of doing the work took, and what came of it, batch by batch."""

    values: list[Any] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak: int | None = None  # bytes beyond the model's own, for the largest batch

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

    One model does both: accelerated and restored in place. The batch with the most tokens is run twice before: to warm
    up, and to measure memory. `count` says how many tokens a batch has, padding left out.
    """
    from tqdm import tqdm

    made = {way: Measured() for way in ways(options)}
    device = next(model.parameters()).device
    longest = max(batches, key=count)
    for way, one in made.items():
        switch(model, way)
        call(longest)
        one.peak = peak_bytes(functools.partial(call, longest), device)
    for batch in tqdm(batches, desc=" and ".join(made), unit="batch"):
        for way, one in made.items():
            switch(model, way)
            begin = now(device)
            one.values.append(call(batch))
            one.seconds += now(device) - begin
            one.tokens += count(batch)
    return made


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was asked to."""
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


def apart(stock: Sequence[float], accelerated: Sequence[float]) -> tuple[float, float]:
    """The largest relative difference of two ways' losses in the first ten steps, and in all.

    Infinite where a loss is not finite, and for both if there are none or not as many of the one as of the other.
    """
    if len(stock) != len(accelerated) or not len(stock):
        return math.inf, math.inf
    each = [
        abs(ours - loss) / max(abs(loss), 1e-12) if math.isfinite(loss) and math.isfinite(ours) else math.inf
        for loss, ours in zip(stock, accelerated, strict=True)
    ]
    return max(each[:10]), max(each)


def check_losses(results: "Results", runs: dict[str, Run], dtype: torch.dtype | str) -> str:
    """How far the losses of the two ways are apart, as a sentence for a table; nothing where there is one way.

    A fault in float32: more than 1e-5 in the first ten steps, or more than 1e-3 in all of at most 100 (longer, and at a
    high learning rate, training magnifies rounding). In every dtype: a loss that is not finite.
    """
    if len(runs) < 2:
        return ""
    stock, ours = runs[STOCK].losses, runs[ACCELERATED].losses
    first, every = apart(stock, ours)
    said = f"Losses differ by at most {first:.1e} in the first ten steps, {every:.1e} in all (relative)."
    exact = str(dtype).removeprefix("torch.") == "float32"
    if math.isinf(every):
        results.fault(f"losses: expected as many finite ones of both ways, got {len(stock)} and {len(ours)}. {said}")
    elif exact and first > 1e-5:
        results.fault(f"losses: expected the same within 1e-5 in the first ten steps. {said}")
    elif exact and len(stock) <= 100 and every > 1e-3:
        results.fault(f"losses: expected the same within 1e-3 in all steps. {said}")
    return said


class Results:
    """What a script leaves for people: tables that it prints, pictures, links; `run_all.py` makes one page of them.

    A result.json of an earlier run is removed: what lies there is this run's or nothing.
    """

    def __init__(self, options: argparse.Namespace, title: str, about: str) -> None:
        self.out: Path = options.out
        (self.out / "result.json").unlink(missing_ok=True)
        self.content: dict[str, Any] = {"title": title, "about": about, "command": sys.argv, "parts": [], "faults": []}

    def fault(self, sentence: str) -> None:
        """Print what must not be, and keep it: `save` raises it, after everything else has been done."""
        print(f"\nFAULT: {sentence}", flush=True)
        self.content["faults"].append(sentence)

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
        """Write result.json, which says that the script came to its end; RuntimeError if there were faults."""
        beside = self.out / "result.json.new"
        beside.write_text(json.dumps(self.content, indent=1, default=str))
        beside.rename(self.out / "result.json")
        if self.content["faults"]:
            raise RuntimeError("; ".join(self.content["faults"]))


def shown(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        return "-" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def axes(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    """Figure and axes of matplotlib, drawn without a display; an array of axes if there are several columns."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
