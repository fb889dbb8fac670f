"""The demo's inputs: texts of the 12 families, a small random Gemma-4 with byte tokens, or a checkpoint."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint

PAD, EOS, BOS, BYTES = 0, 1, 2, 3  # token ids: specials, then the 256 bytes


@dataclass(frozen=True)
class Size:
    """H hidden, I expert intermediate, E experts, K per token; `texts` per family of at most `length` tokens."""

    H: int = 384
    I: int = 96  # noqa: E741
    E: int = 128
    K: int = 8
    layers: int = 6
    texts: int = 4
    length: int = 192
    rounds: int = 7


@dataclass
class Batch:
    """Token ids [B, S] and attention mask [B, S]; padding on the right."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`."""
        return Batch(self.ids.to(device), self.mask.to(device))


Encode = Callable[[list[str], int], Batch]


def load_texts(count: int) -> dict[str, list[str]]:
    """`count` texts of each family, in the order of the shipped file."""
    texts: dict[str, list[str]] = {}
    for line in (files("omnigene_fast") / "data" / "modalities.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        family = texts.setdefault(row["family"], [])
        if len(family) < count:
            family.append(row["text"])
    return texts


def byte_ids(text: str) -> list[int]:
    """UTF-8 bytes as token ids."""
    return [BYTES + byte for byte in text.encode()]


def encode_bytes(texts: list[str], length: int) -> Batch:
    """UTF-8 bytes behind a BOS, cut at `length` tokens and padded."""
    rows = [[BOS, *byte_ids(text)][:length] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return Batch(ids, mask)


def small_model(size: Size, device: torch.device, seed: int = 0) -> tuple[Any, Encode, str]:
    """A Gemma4ForCausalLM of `size` in bfloat16 with random weights, its encoder, and a line that describes it."""
    from transformers import Gemma4ForCausalLM

    config = text_config(size)
    model = Gemma4ForCausalLM(config)
    initialise(model, torch.Generator().manual_seed(seed))
    model = model.to(device, torch.bfloat16).eval()
    kinds = config.layer_types or []
    title = (
        f"model: Gemma4ForCausalLM with random weights (seed {seed}), {_millions(model)} in bfloat16:"
        f" {size.layers} layers ({kinds.count('sliding_attention')} sliding, {kinds.count('full_attention')} full"
        f" attention), H={size.H}, I={size.I}, E={size.E}, K={size.K}, a dense MLP beside the experts; tokens are bytes"
    )
    return model, encode_bytes, title


def text_config(size: Size, vocabulary: int = BYTES + 256) -> Any:
    """The Gemma4TextConfig of `size` with byte tokens; `vocabulary` counts them and what follows them."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        vocab_size=vocabulary,
        vocab_size_per_layer_input=vocabulary,
        hidden_size=size.H,
        hidden_size_per_layer_input=0,
        intermediate_size=3 * size.I,
        moe_intermediate_size=size.I,
        num_experts=size.E,
        top_k_experts=size.K,
        enable_moe_block=True,
        num_hidden_layers=size.layers,
        layer_types=["sliding_attention"] * (size.layers - 1) + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=128,
        sliding_window=64,
        max_position_embeddings=4096,
        final_logit_softcapping=30.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def load_checkpoint(path: Path, device: torch.device) -> tuple[Any, Encode, str]:
    """A causal language model in bfloat16 with its tokenizer, and a line that describes it.

    Raises:
        ValueError: `path` holds no checkpoint, or not a whole one.
    """
    checkpoint.check(path, "--model")
    tokenizer = checkpoint.load_tokenizer(path, "--model", padding_side="right")
    model = checkpoint.load_model(path, torch.bfloat16, device, argument="--model")

    def encode(texts: list[str], length: int) -> Batch:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return Batch(encoded["input_ids"], encoded["attention_mask"])

    return model, encode, f"model: {type(model).__name__} from {path}, {_millions(model)} in bfloat16"


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights with which a random model behaves a little like a trained one.

    Activations stay near unit size; what a layer adds to the residual is smaller than the residual; the router's logits
    spread enough that the eighth expert weighs little. The init of a model about to be trained would route almost
    uniformly, and rounding would decide between its experts.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("router.proj.weight"):
            parameter.data.normal_(std=2.0, generator=generator)
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            parameter.data.fill_(0.25)
        elif name.endswith("per_expert_scale"):
            parameter.data.uniform_(0.8, 1.2, generator=generator)
        elif name in ("model.norm.weight", "model.language_model.norm.weight"):
            parameter.data.fill_(0.1)  # small logits: the loss of the untrained model is about ln(vocabulary)
        elif parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=1 / math.sqrt(parameter.shape[-1]), generator=generator)


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.0f} M parameters"
