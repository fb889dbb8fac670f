"""Instruction tuning after cpt.py, by the recipe of OmniGene-4: questions with answers, the answer alone is learned.

Three tasks, the training part of each: are two proteins homologous (homology.py), is a definition that of its term
(true_false.py), which kind of sequence is this. The adapters and the training are those of cpt.py; what comes out is
OUT/model.

    python examples/omnigene/sft.py --compare --model out/cpt/model
    python examples/omnigene/sft.py --model CKPT --steps 2000 --length 2048 --batch 4 --out out/sft
    torchrun --nproc_per_node 2 examples/omnigene/sft.py --batch 4          two processes by DDP; FSDP2 with --fsdp
"""

import random
from collections.abc import Sequence

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
    parser = cpt.parser(__doc__, "sft", length=800)
    parser.add_argument("--limit", type=train_lora.positive, help="questions of a task at most; all by default")
    options = parser.parse_args(argv)
    shared.start(options)
    asked = mixture(options.limit, options.seed)
    rows = [{"prompt": question.prompt, "response": question.answer} for question in asked]
    tasks = ", ".join(f"{sum(question.group == task for question in asked)} {task}" for task in TASKS)
    return cpt.stage(options, rows, "Instruction tuning", f"questions: {tasks}", "--answer-only")


def mixture(limit: int | None = None, seed: int = 0) -> list[Question]:
    """The training questions of all tasks, at most `limit` of each; their group is the task's name."""
    made = []
    for task, questions in TASKS.items():
        asked = list(questions("train"))
        if limit is not None and limit < len(asked):
            asked = random.Random(seed).sample(asked, limit)
        made += [Question(one.prompt, one.answer, task) for one in asked]
    return made


def kinds(part: str) -> list[Question]:
    """Which of the 12 families the beginning of a text is from; "test" are the texts that cpt.py leaves out."""
    made: dict[str, list[Question]] = {"train": [], "test": []}
    seen = set()  # some texts begin alike
    for family, each in load_texts(10**6).items():
        for number, text in enumerate(each):
            prompt = f"{text[:SHOWN]}\nWhich kind? "
            if prompt not in seen:
                made["train" if number < cpt.TRAINED else "test"].append(Question(prompt, family, family))
            seen.add(prompt)
    return made[part]


TASKS = {"homology": homology.questions, "true/false": true_false.questions, "kind": kinds}


if __name__ == "__main__":
    shared.script("sft", main)
