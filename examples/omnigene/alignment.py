"""Scores of pairs of domains by other methods: MMseqs2, DIAMOND, and the similarity of ESM-2's embeddings."""

import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shared
from shared import Pair

PACKAGES = {"mmseqs": "mmseqs2", "diamond": "diamond-aligner"}  # Debian's names
FIELDS = "query", "target", "bits"
# Every hit up to E = 10 counts, and no domain's list of hits is cut short.
MMSEQS = ["mmseqs", "easy-search", "{fasta}", "{fasta}", "{hits}", "{tmp}", "-s", "7.5", "-e", "10"]
MMSEQS += ["--max-seqs", "2000", "--format-output", ",".join(FIELDS), "--threads", "{threads}"]
DIAMOND = ["diamond", "blastp", "-q", "{fasta}", "-d", "{fasta}", "-o", "{hits}", "--tmpdir", "{tmp}", "-e", "10"]
DIAMOND += ["--max-target-seqs", "0", "--outfmt", "6", "qseqid", "sseqid", "bitscore", "--threads", "{threads}"]
COMMANDS = {
    "mmseqs2": {"MMseqs2 -s 7.5": MMSEQS},
    "diamond": {
        "DIAMOND --ultra-sensitive --masking 0": [*DIAMOND, "--ultra-sensitive", "--masking", "0"],
        "DIAMOND, default": DIAMOND,
    },
}


def required(method: str) -> dict[str, list[str]]:
    """The commands of "mmseqs2" or "diamond", none of "model"; RuntimeError with the way out if one is missing."""
    commands = COMMANDS.get(method, {})
    for command in commands.values():
        try:
            shared.program(command[0], PACKAGES[command[0]])
        except RuntimeError as error:
            others = " ".join(name for name in ("model", *COMMANDS) if name != method)
            raise RuntimeError(f"{error}; or leave it out: --methods {others}") from None
    return commands


def rule(what: str, cut: float) -> str:
    """In words: above which score the answer is yes."""
    return "always" if cut == float("-inf") else "never" if cut == float("inf") else f"{what} > {cut:.4g}"


def aligned(command: Sequence[str], pairs: Sequence[Pair], threads: int | None) -> tuple[list[float], float]:
    """The best bit score of each pair, 0 without a hit, and the seconds of the search.

    All domains of the pairs are searched against all of them; a pair's score is the better of its two directions.
    Raises RuntimeError with the program's last line if it fails.
    """
    known = {domain.name: domain for pair in pairs for domain in (pair.a, pair.b)}
    with tempfile.TemporaryDirectory() as folder:
        place = {"fasta": f"{folder}/domains.fasta", "hits": f"{folder}/hits.tsv", "tmp": f"{folder}/tmp"}
        Path(place["tmp"]).mkdir()
        Path(place["fasta"]).write_text("".join(f">{name}\n{domain.sequence}\n" for name, domain in known.items()))
        begin = time.perf_counter()
        filled = [part.format(**place, threads=threads or torch.get_num_threads()) for part in command]
        done = subprocess.run(filled, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.perf_counter() - begin
        if done.returncode:
            last = (done.stdout.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {last}")
        hits = Path(place["hits"])
        rows = [line.split("\t") for line in hits.read_text().splitlines()] if hits.is_file() else []
    best: dict[frozenset[str], float] = defaultdict(float)
    for query, target, bits in rows:
        key = frozenset((query, target))
        best[key] = max(best[key], float(bits))
    return [best[frozenset((pair.a.name, pair.b.name))] for pair in pairs], seconds


def load_esm(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a local ESM-2 checkpoint; ValueError if the directory holds none."""
    from transformers import AutoConfig, AutoTokenizer, EsmModel

    if not (path / "config.json").is_file() or AutoConfig.from_pretrained(path).model_type != "esm":
        raise ValueError(f"--esm: expected the directory of an ESM-2 checkpoint with a config.json, got {path}.")
    model = EsmModel.from_pretrained(path, add_pooling_layer=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), AutoTokenizer.from_pretrained(path)


def similar(esm: tuple[Any, Any], pairs: Sequence[Pair], batch: int) -> tuple[list[float], float]:
    """The cosine of the two domains' embeddings for each pair, and the seconds that all of it took."""
    begin = time.perf_counter()
    known = list({domain.name: domain.sequence for pair in pairs for domain in (pair.a, pair.b)}.items())
    known.sort(key=lambda each: len(each[1]))
    vectors: dict[str, Tensor] = {}
    for at in tqdm(range(0, len(known), batch), desc="ESM-2", unit="batch"):
        names, sequences = zip(*known[at : at + batch], strict=True)
        vectors |= dict(zip(names, embedded(*esm, sequences), strict=True))
    cosine = [torch.cosine_similarity(vectors[pair.a.name], vectors[pair.b.name], dim=0).item() for pair in pairs]
    return cosine, time.perf_counter() - begin


def embedded(model: Any, tokenizer: Any, sequences: Sequence[str]) -> Tensor:
    """The mean over the residues of the last hidden state, [sequences, H] float32; <cls> and <eos> are left out."""
    inputs = tokenizer(list(sequences), padding=True, return_tensors="pt", return_special_tokens_mask=True)
    residue = 1 - inputs.pop("special_tokens_mask")  # padding is special too
    with torch.no_grad():
        hidden = model(**inputs.to(model.device)).last_hidden_state.float().cpu()
    return (hidden * residue[..., None]).sum(1) / residue.sum(1, keepdim=True)


def threshold(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The score above which a pair counts as homologous so that most labels are right; the lowest of equally good ones.

    Candidates lie half way between neighbouring scores, and below them all.
    """
    levels = sorted(set(scores))
    candidates = [-math.inf, *((low + high) / 2 for low, high in itertools.pairwise(levels)), math.inf]
    rights = [sum((score > cut) == label for score, label in zip(scores, labels, strict=True)) for cut in candidates]
    return candidates[rights.index(max(rights))]
