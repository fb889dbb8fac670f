"""Questions as token ids: where prompt and answer meet, what of them is prefilled, learned, and read back."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import shared
import torch
from shared import Question
from torch import Tensor

from omnigene_fast.demo.training import IGNORED


def text(prompt: str, answer: str) -> str:
    """Prompt and answer as they are trained and scored: a space is between, unless the prompt ends in white space."""
    return prompt + answer if not prompt or prompt[-1].isspace() else f"{prompt} {answer}"


def token_ids(tokenizer: Any, string: str) -> list[int]:
    """Token ids behind the begin-of-sequence token, where the tokenizer has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + tokenizer(string, add_special_tokens=False)["input_ids"]


def common(rows: Sequence[Sequence[int]]) -> int:
    """With how many tokens all rows begin alike."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return sum(1 for _ in alike)


def candidates(tokenizer: Any, prompt: str, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """The token ids that prompt and answer begin with whichever of the `words` it is, and each word's next token.

    Bytes have the space in common and part at the words' first letters; with SentencePiece "▁yes" is one token.
    Raises ValueError unless the next tokens differ, because a prefill sees these alone.
    """
    rows = [token_ids(tokenizer, text(prompt, word)) for word in words]
    alike = common(rows)
    first = [row[alike] for row in rows if len(row) > alike]
    if len(set(first)) < len(words):
        raise ValueError(
            f"answers: expected none that begins as another one does, got {', '.join(map(repr, words))},"
            f" of which a prefill sees {len(set(first))} first tokens."
        )
    return rows[0][:alike], first


def prompt_batches(
    tokenizer: Any, questions: Sequence[Question], words: Sequence[str], size: int, device: torch.device
) -> list[tuple[list[int], dict[str, Tensor], Tensor]]:
    """Questions as batches, longest first, padded on the left: (numbers of the questions, the model's inputs, the
    `candidates` for the next token [B, words])."""
    made = [candidates(tokenizer, question.prompt, words) for question in questions]
    order = sorted(range(len(made)), key=lambda n: -len(made[n][0]))
    return [
        (
            numbers,
            shared.padded([made[n][0] for n in numbers], tokenizer.pad_token_id, device),
            torch.tensor([made[n][1] for n in numbers], device=device),
        )
        for numbers in (order[at : at + size] for at in range(0, len(order), size))
    ]


def sample(tokenizer: Any, question: Question) -> dict[str, list[int]]:
    """A question with its answer and its end as token ids; labels are what follows the prompt's own tokens."""
    whole = [*token_ids(tokenizer, text(question.prompt, question.answer)), tokenizer.eos_token_id]
    own = common([whole, token_ids(tokenizer, question.prompt)])
    return {"input_ids": whole, "labels": [IGNORED] * own + whole[own:]}


def decoded(tokenizer: Any, ids: Any) -> str:
    """The text of token ids without special ones."""
    made: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return made


def said(string: str, words: Sequence[str]) -> str | None:
    """The word with which a text begins, if it is a whole one: "not" and "none" are no "no"."""
    return next((word for word in words if re.match(rf"\s*{re.escape(word)}(?!\w)", string)), None)
