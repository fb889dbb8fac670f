"""Instruction tuning after cpt.py, by the recipe of OmniGene-4: questions with answers, the answer alone is learned.

Three tasks, the training part of each: are two proteins homologous (homology.py), is a definition that of its term
(true_false.py), which kind of sequence is this. The adapters and the training are those of cpt.py; what comes out is
OUT/model. Left out is what is tested or audited later, as in cpt.py, and what is longer than --length.

    python examples/omnigene/sft.py --compare --model out/cpt/model
    python examples/omnigene/sft.py --model CKPT --steps 2000 --length 2048 --batch 4 --out out/sft
    torchrun --nproc_per_node 2 examples/omnigene/sft.py --batch 4          two processes by DDP; FSDP2 with --fsdp
"""

import random
from collections.abc import Iterable, Sequence

import cpt
import homology
import shared
import train_lora
import true_false
from shared import Question

from omnigene_fast.demo.model import load_texts
from omnigene_fast.demo.training import Run

SHOWN = 90  # characters of a sequence whose kind is asked for


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Train, report; what came of it as "stock" and "accelerated"."""
    parser = cpt.parser(__doc__, "sft", length=800, steps=40, small_rate=1e-3)
    parser.add_argument("--limit", type=train_lora.positive, help="questions of a task at most; all by default")
    options = parser.parse_args(argv)
    cpt.start(options)
    every = mixture(options.limit, options.seed)
    tokenizer = shared.load_tokenizer(shared.checkpoint(options))
    # As train_lora does, so that what is reported is what is trained on.
    asked = [one for one in every if len(train_lora.ids(one.prompt, tokenizer, begin=True)) < options.length]
    if not asked:
        raise ValueError(f"--length: expected more than {options.length} tokens, which every question has or exceeds.")
    rows = [{"prompt": question.prompt, "response": f" {question.answer}"} for question in asked]
    about = "questions: " + ", ".join(f"{sum(one.group == task for one in asked)} {task}" for task in TASKS)
    about += f"; {len(every) - len(asked)} more left out, of {options.length} tokens or more"
    return cpt.stage(options, rows, "Instruction tuning", about, "--answer-only")


def mixture(limit: int | None = None, seed: int = 0) -> list[Question]:
    """The training questions of all tasks, at most `limit` of each; their group is the task's name."""
    made = []
    for task, questions in TASKS.items():
        asked = clear(questions("train")) if task != "true/false" else whole_terms(questions("train"))
        if limit is not None and limit < len(asked):
            asked = random.Random(seed).sample(asked, limit)
        made += [Question(one.prompt, one.answer, task) for one in asked]
    return made


def clear(asked: Iterable[Question]) -> list[Question]:
    """Those of the questions that hold nothing that is tested or audited."""
    return [one for one in asked if not cpt.held(one.prompt)]


def whole_terms(asked: Iterable[Question]) -> list[Question]:
    """Those of the statements whose terms are not the audit's: for each piece of a definition both or none, so that as
    many are true as false."""
    terms = true_false.terms("train")
    known = {name: pieces for name, pieces in terms.items() if not cpt.held(f"{name}. {' '.join(pieces)}")}
    about = [one for one in asked if one.group in known]
    made = []
    for piece in (piece for pieces in known.values() for piece in pieces):
        both = [one for one in about if f": {piece}\n" in one.prompt]
        made += both if len(both) == len(true_false.ANSWERS) else []
    return made


def kinds(part: str) -> list[Question]:
    """Which of the 12 families the beginning of a text is from: of those of cpt.py ("train"), of the audit's ("test").

    No text of the one begins as one of the other does.
    """
    if part == "train":
        texts = [(family, text) for family, each in cpt.texts().items() for text in each]
    else:
        texts = [(family, text) for family, each in load_texts(10**6).items() for text in each[cpt.TRAINED :]]
    # Some texts begin alike: the first of them is asked about.
    first = {text[:SHOWN]: family for family, text in reversed(texts)}
    return [
        Question(f"{begin}\nWhich kind?", family, family)
        for begin, family in reversed(first.items())
        if part == "test" or not cpt.held(begin)
    ]


TASKS = {"homology": homology.questions, "true/false": true_false.questions, "kind": kinds}


if __name__ == "__main__":
    shared.script("sft", main)
