"""The three LoRA stages of OmniGene-4-MM: data, adapters, and the model's answers after each."""

import argparse
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import answers
import cpt
import shared
import torch
import train_lora
from homology import ANSWERS, questions
from molecules import Molecule, split_molecules
from peft import LoraConfig, PeftModel, get_peft_model
from shared import Question
from torch import Tensor
from tqdm import tqdm
from vision import Encoder, generated, losses

HOMOLOGY_TIMES = 3  # how often its questions are among the texts, as in the paper's third stage


@dataclass(frozen=True)
class Stage:
    """A stage of the paper: `images` is the share of samples with an image, `rate` its learning rate.

    `small_rate` is the small model's: it learns little at the paper's, and magnifies rounding at higher ones.
    """

    name: str
    rank: int
    images: float
    rate: float
    small_rate: float
    embedding: bool  # trained


# The second takes the first one's embedding and begins its adapter anew, because the rank differs; the third goes on.
STAGES = (
    Stage("1 captions", 32, 1.0, 5e-6, 3e-3, True),
    Stage("2 half text", 64, 0.5, 3e-6, 1e-3, True),
    Stage("3 mostly text", 64, 0.1, 2e-5, 1e-3, False),
)


def adapted(model: Any, stage: Stage, seed: int) -> Any:
    """The model with the stage's LoRA: that of the stage before, if it has its rank, or a new one on its embedding."""
    if not isinstance(model, PeftModel) or model.peft_config["default"].r != stage.rank:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=stage.rank,
            lora_alpha=2 * stage.rank,
            target_modules=train_lora.TARGETS,
            exclude_modules=train_lora.TOWERS,
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model.unload() if isinstance(model, PeftModel) else model, config)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.requires_grad_(stage.embedding)
    return model


def tower_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the vision tower and its projection into the language model, by their names without PEFT's."""
    for name, parameter in model.named_parameters():
        if re.fullmatch(train_lora.TOWERS, name):
            yield name.removeprefix("base_model.model."), parameter


def check_towers(model: Any, before: dict[str, Tensor]) -> None:
    """RuntimeError unless every parameter of the vision tower is what it was and has no gradient."""
    now = dict(tower_parameters(model))
    changed = [name for name in before | now if name not in now or not torch.equal(now[name].cpu(), before[name])]
    changed += [name for name, parameter in now.items() if parameter.grad is not None or parameter.requires_grad]
    if changed or not now:
        raise RuntimeError(f"training: expected a frozen vision tower, got a change of {changed or 'its names'}.")


def trained(model: Any) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, on the CPU, by their names."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def put_back(model: Any, before: dict[str, Tensor]) -> None:
    """Give the parameters that are trained the values of `before`, in place; KeyError if it lacks one."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(before[name])


def samples(encoder: Encoder, stage: Stage, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """`count` samples of the train part, the stage's share of them with an image."""
    pictures = [(each.question, each.smiles) for each in split_molecules("train")]
    texts = [(question, None) for question in questions("train") * HOMOLOGY_TIMES]
    for family, each in cpt.texts().items():  # which hold no domain of the tests
        if family != "molecule":
            texts += [(Question("", text[: options.length], family), None) for text in each]
    order = random.Random(options.seed)
    order.shuffle(pictures)
    order.shuffle(texts)
    seen = round(count * stage.images)
    chosen = [
        *itertools.islice(itertools.cycle(pictures), seen),
        *itertools.islice(itertools.cycle(texts), count - seen),
    ]
    return [encoder.sample(*each) for each in chosen]


@dataclass
class State:
    """What the model answers at one time, to `--limit` questions and images of the test part."""

    margins: Tensor  # [N] logit of "yes" less that of "no", for pairs of proteins
    captions: list[str]
    own: Tensor  # [M] loss of the right caption beside its molecule's image, nats per token
    other: Tensor  # [M] the same beside another molecule's image


def asked(options: argparse.Namespace) -> list[Question]:
    """`--limit` pairs of proteins of the test part, drawn by the seed."""
    every = questions("test")
    return random.Random(options.seed).sample(every, min(options.limit, len(every)))


def state(model: Any, encoder: Encoder, options: argparse.Namespace, tests: Sequence[Molecule]) -> State:
    """Answers and captions of the test part, as the model is."""
    pairs = asked(options)
    margins = torch.empty(len(pairs))
    for numbers, inputs, first in answers.prompt_batches(
        encoder.tokenizer, pairs, ANSWERS, options.batch, model.device
    ):
        margins[numbers] = answers.margins(model, inputs, first)
    found = State(margins, [], torch.empty(0), torch.empty(0))
    others = [*tests[1:], tests[0]]
    for at in tqdm(range(0, len(tests), options.batch), desc="captions", unit="batch"):
        some, wrong = tests[at : at + options.batch], others[at : at + options.batch]
        prompts = encoder.prompts([encoder.prompt(each.question, each.smiles) for each in some])
        found.captions += generated(model, encoder, prompts, options.tokens)
        given = [(each, each) for each in some] + list(zip(some, wrong, strict=True))
        both = losses(model, encoder, [encoder.sample(each.question, image.smiles) for each, image in given])
        own, other = both.chunk(2)
        found.own, found.other = torch.cat([found.own, own]), torch.cat([found.other, other])
    return found


def states(model: Any, encoder: Encoder, options: argparse.Namespace, tests: Sequence[Molecule]) -> dict[str, State]:
    """The state by every way of `options`, of the same weights."""
    return {way: state(shared.switch(model, way), encoder, options, tests) for way in shared.ways(options)}
