"""A Gemma-4 with its vision tower: a small random one or a checkpoint, its inputs with images, what it says to them."""

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts
import shared
import torch
from molecules import Molecule, image
from shared import Question
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import omnigene_fast
from omnigene_fast.demo.model import BYTES, initialise, text_config
from omnigene_fast.demo.training import IGNORED, collate

SPECIALS = ("<|image>", "<image|>", "<|image|>", "<|audio|>", "<|video|>")  # begin and end of an image, soft tokens
KINDS = ("image", "text", "SMILES")  # of tokens, in the audit


@dataclass(frozen=True)
class Encoder:
    """Questions, with an image or without, as inputs of a Gemma-4 with a vision tower.

    The prompt is what transformers' Gemma4Processor makes: begin of image, a token for every soft token of the image,
    end of image, text. That class wants torchvision; its Pillow image processor does not.
    """

    tokenizer: Any
    processor: Any  # Gemma4ImageProcessorPil
    config: Any  # Gemma4Config: the ids of the tokens around and for an image

    @property
    def side(self) -> int:
        """Soft tokens on a side of a square image."""
        return math.isqrt(self.processor.max_soft_tokens)

    @property
    def pixels(self) -> int:
        """Pixels on a side, so that the processor need not resize."""
        return self.side * self.processor.patch_size * self.processor.pooling_kernel_size

    def sample(self, question: Question, smiles: str | None = None) -> dict[str, Any]:
        """Token ids, the labels of the answer and its end alone, and the molecule whose image comes first."""
        made: dict[str, Any] = {**prompts.sample(self.tokenizer, question), "smiles": smiles}
        if smiles is not None:  # behind the begin-of-sequence token, where there is one
            soft = [self.config.boi_token_id, *[self.config.image_token_id] * self.side**2, self.config.eoi_token_id]
            at = self.tokenizer.bos_token_id is not None
            made["input_ids"] = [*made["input_ids"][:at], *soft, *made["input_ids"][at:]]
            made["labels"] = [IGNORED] * len(soft) + made["labels"]
        return made

    def prompt(self, question: Question, smiles: str | None = None) -> dict[str, Any]:
        """A sample without its answer."""
        sample = self.sample(question, smiles)
        return {**sample, "input_ids": sample["input_ids"][: sample["labels"].count(IGNORED)]}

    def batch(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples padded on the right, with labels."""
        read = [{name: sample[name] for name in ("input_ids", "labels")} for sample in samples]
        return self.with_images(collate(read, self.tokenizer.pad_token_id), samples)

    def prompts(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples padded on the left, without labels."""
        ids = [sample["input_ids"] for sample in samples]
        return self.with_images(shared.padded(ids, self.tokenizer.pad_token_id, torch.device("cpu")), samples)

    def with_images(self, inputs: dict[str, Tensor], samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Inputs with the pixels of those samples that have an image, and where their tokens are."""
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.config.image_token_id).long()
        drawn = [image(sample["smiles"], self.pixels) for sample in samples if sample["smiles"] is not None]
        if drawn:
            made = self.processor(drawn, return_tensors="pt")
            inputs |= {name: made[name] for name in ("pixel_values", "image_position_ids")}
        return inputs


def checkpoint(options: argparse.Namespace) -> Path:
    """--model, or a small random model with a vision tower and its image processor in OUT/base."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    if options.model is not None:
        return shared.checkpoint(options)
    path = options.out / "base"
    if not (path / "preprocessor_config.json").is_file():
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision |= {"num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 64}
        sizes = {"patch_size": 8, "pooling_kernel_size": 2}
        first = BYTES + 256
        names = ("boi_token_id", "eoi_token_id", "image_token_id", "audio_token_id", "video_token_id")
        text = text_config(shared.SMALL, first + len(SPECIALS)).to_dict() | {"use_bidirectional_attention": "vision"}
        ids = {name: first + place for place, name in enumerate(names)}
        model = Gemma4ForConditionalGeneration(
            Gemma4Config(text_config=text, vision_config=vision | sizes, audio_config=None, **ids)
        )
        initialise(model, torch.Generator().manual_seed(options.seed))
        model.model.language_model.norm.weight.data.fill_(0.5)  # frozen: it decides how soon the model can spell
        shared.save(model, shared.byte_tokenizer(SPECIALS), path)
        Gemma4ImageProcessorPil(max_soft_tokens=70, **sizes).save_pretrained(path)
    return path


def load(options: argparse.Namespace) -> tuple[Any, Encoder]:
    """The stock model and what makes its inputs; ValueError if it cannot see."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    path = checkpoint(options)
    model, tokenizer = shared.load(options, path)
    if getattr(model.config, "vision_config", None) is None:
        raise ValueError(f"--model: expected a checkpoint with a vision tower, got a {type(model).__name__} in {path}.")
    return model, Encoder(tokenizer, Gemma4ImageProcessorPil.from_pretrained(path), model.config)


def generated(model: Any, encoder: Encoder, inputs: dict[str, Tensor], tokens: int) -> list[str]:
    """What greedy `generate` says after each prompt with its image."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "position_ids"}
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=encoder.tokenizer.pad_token_id
        )
    return encoder.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def losses(model: Any, encoder: Encoder, some: Sequence[dict[str, Any]]) -> Tensor:
    """Mean loss of each sample's labels, [B] nats per token."""
    inputs = {name: tensor.to(model.device) for name, tensor in encoder.batch(some).items()}
    labels = inputs.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    each = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where the label is IGNORED
    return (each.sum(1) / (labels >= 0).sum(1)).cpu()


def audit(model: Any, encoder: Encoder, tests: Sequence[Molecule], options: argparse.Namespace, name: str) -> None:
    """Trace the test molecules: tokens of the image, those of the text beside it, and the SMILES without an image.

    Each is a document of its own, with the label "kind". A document's labels are those of its row, so the tokens of
    the image and of the text take a pass each.
    """
    path = options.out / f"trace_{name}"
    shutil.rmtree(path, ignore_errors=True)
    with torch.no_grad(), omnigene_fast.trace(model, path, meta={"tokenizer": str(options.model or "bytes")}) as tracer:
        for at in tqdm(range(0, len(tests), options.batch), desc="tracing", unit="batch"):
            some = tests[at : at + options.batch]
            seen = encoder.batch([encoder.sample(each.question, each.smiles) for each in some])
            read = encoder.batch([encoder.sample(Question("", each.smiles, "")) for each in some])
            image = seen["mm_token_type_ids"].bool()
            for kind, inputs, tokens in (("image", seen, image), ("text", seen, ~image), ("SMILES", read, None)):
                number = KINDS.index(kind) * len(tests) + torch.arange(at, at + len(some))
                tracer.label(doc_ids=number if tokens is None else torch.where(tokens, number[:, None], -1), kind=kind)
                given = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "labels"}
                model(**given, use_cache=False)
