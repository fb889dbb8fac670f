"""Classifiers of residues on a language model's last hidden state: structure predicted from sequence.

OmniGene-4's SFT v5 has two, 3Di (20 classes) and DSSP (8), on the hidden state of the label's own token, where the
answer can be copied. Here the heads read the token of the residue in the sequence, which is before any label.

    heads = ResidueHeads(model.config.get_text_config().hidden_size)
    dual = DualHead(model, heads)  # trains in any Trainer: loss = half the language loss, half that of the heads
    dual(input_ids=ids, labels=answer, labels_3di=states, labels_dssp=structure)["loss"].backward()

The hidden state is taken from the forward that computes the language loss (`last_hidden_state`). It is that of the last
layer alone: `output_hidden_states=True` would keep those of all layers.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

TRACKS = {"3di": "ACDEFGHIKLMNPQRSTVWY", "dssp": "HECTSGBI"}  # a letter per class, in the order of the ids
IGNORED = -100  # the label of a token that is no residue, or whose class is not known


class ResidueHeads(nn.Module):
    """A linear classifier per track of labels, all on the same hidden state.

    Args:
        hidden_size: H of the hidden states; `model.config.get_text_config().hidden_size`.
        tracks: name -> letters of its classes; 3Di and DSSP by default.
        device, dtype: of the weights. Trained weights should be float32: hidden states are cast to them.

    Raises:
        ValueError: `hidden_size` below 1, no track, a name that cannot be part of a keyword, letters that repeat.
    """

    def __init__(
        self,
        hidden_size: int,
        tracks: Mapping[str, str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.tracks = dict(TRACKS if tracks is None else tracks)
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {hidden_size}.")
        if not self.tracks:
            raise ValueError("tracks: expected at least one name with the letters of its classes, got none.")
        for name, letters in self.tracks.items():
            if not f"labels_{name}".isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(f"tracks: expected names of letters, digits and underscores, got {name!r}.")
            if not letters or len(set(letters)) < len(letters):
                raise ValueError(f"tracks: expected distinct letters, one per class, for {name!r}, got {letters!r}.")
        self.linears = nn.ModuleDict(
            {
                name: nn.Linear(hidden_size, len(letters), device=device, dtype=dtype)
                for name, letters in self.tracks.items()
            }
        )

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """Logits [..., C] of each track for hidden states [..., H], in the dtype of the weights, autocast or not.

        Raises:
            ValueError: the last dimension is not `hidden_size`.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden: expected [..., {self.hidden_size}], got {list(hidden.shape)}.")
        with torch.autocast(hidden.device.type, enabled=False):
            return {name: linear(hidden.to(_dtype(linear))) for name, linear in self.linears.items()}

    def loss(self, hidden: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy in nats, in float32: the mean over the labelled residues of a track, then over the tracks.

        The labelled positions are gathered first, so that nothing is computed for the others. A track without a label
        counts as 0, with gradients of 0.

        Args:
            hidden: [B, S, H].
            labels: of every track, [B, S] int64, ids of `encode`, -100 where there is no label.

        Raises:
            ValueError: a track is missing or unknown, a shape is not that of `hidden`, a label is no class.
        """
        if labels.keys() != self.tracks.keys():
            raise ValueError(
                f"labels: expected the tracks {', '.join(self.tracks)}, got {', '.join(labels) or 'none'};"
                " label with -100 what is not known."
            )
        for name, ids in labels.items():
            if ids.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"labels[{name!r}]: expected {list(hidden.shape[:-1])}, one label per hidden state,"
                    f" got {list(ids.shape)}."
                )
        labelled = torch.stack([ids != IGNORED for ids in labels.values()]).any(0)
        targets = {name: ids[labelled] for name, ids in labels.items()}
        # Through __call__ and with no track left out: DDP and FSDP need their hooks, and a gradient of every weight.
        rows = self(hidden[labelled])  # [n, C] each
        return torch.stack([_cross_entropy(logits, targets[name], name) for name, logits in rows.items()]).mean()

    def encode(self, track: str, text: str, *, unknown: str = "") -> list[int]:
        """The class of each letter of `text`; -100 for the letters in `unknown`.

        Raises:
            ValueError: a track that is not there, a letter that is no class of it.
        """
        classes = {letter: IGNORED for letter in unknown} | {x: n for n, x in enumerate(self._letters(track))}
        for position, letter in enumerate(text):
            if letter not in classes:
                raise ValueError(
                    f"text: expected letters of {self.tracks[track]} for {track!r}, got {letter!r} at position"
                    f" {position}; letters in unknown=... become -100."
                )
        return [classes[letter] for letter in text]

    def decode(self, track: str, ids: Iterable[int] | Tensor) -> str:
        """The letters of class ids [n], such as `logits.argmax(-1)`."""
        letters = self._letters(track)
        return "".join(letters[n] for n in (ids.tolist() if isinstance(ids, Tensor) else ids))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and the tracks as a safetensors file, which replaces what is there once it is whole.

        Every process of a sharded model has to call it.
        """
        from safetensors.torch import save

        tensors = {name: _whole(tensor).detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        target = Path(path)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with open(beside, "xb") as file:
                file.write(save(tensors, {"tracks": json.dumps(self.tracks)}))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tracks: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> "ResidueHeads":
        """The heads of a file that `save` wrote.

        Args:
            path: of the file.
            tracks: those that the caller counts on; by default whatever the file has.
            device: where the weights go.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it is not one of `save`, or it has other tracks, or their letters in another order.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = json.loads((file.metadata() or {}).get("tracks", "{}"))
        except SafetensorError as error:
            raise ValueError(f"path: expected a safetensors file, got {os.fspath(path)} ({error}).") from None
        weights = [tensor for name, tensor in tensors.items() if name.endswith(".weight")]
        if not found or not weights:
            raise ValueError(f"path: expected a file that ResidueHeads.save wrote, got {os.fspath(path)}.")
        if tracks is not None and dict(tracks) != found:
            raise ValueError(f"tracks: expected {_listed(tracks)}, got {_listed(found)} in {os.fspath(path)}.")
        heads = cls(weights[0].shape[-1], found, device=device, dtype=weights[0].dtype)
        heads.load_state_dict(tensors)
        return heads

    def _letters(self, track: str) -> str:
        if track not in self.tracks:
            raise ValueError(f"track: expected one of {', '.join(self.tracks)}, got {track!r}.")
        return self.tracks[track]


class DualHead(nn.Module):
    """A language model and heads as one module that returns one loss, for Trainer, DDP and FSDP.

    Everything else that is asked of it, such as `gradient_checkpointing_enable` or `config`, is the model's. With
    Trainer, `remove_unused_columns=False` keeps the heads' labels; save `dual.model` and `dual.heads`, each by its own
    method.

    Args:
        model: a language model of transformers, bare or in wrappers, accelerated or not.
        heads: on its hidden states.
        weight: of the heads' loss; the language loss has the rest, and with 1 it is not computed. OmniGene-4's is 0.5.

    Raises:
        ValueError: `weight` is not between 0 and 1.
    """

    # The losses are means over a batch: Trainer shall divide by the number of accumulated batches, not pass its own
    # number of tokens, which the heads would not know how to use.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, heads: ResidueHeads, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: expected a share between 0 and 1, got {weight}.")
        self.model, self.heads, self.weight = model, heads, weight

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The weighted `loss`, and its parts `language_loss` and `residue_loss` without a gradient.

        Args:
            inputs: those of the model, `labels` among them, and `labels_<track>` [B, S] for every track of the heads.
                With a weight of 1 `labels` are neither needed nor used, and there is no `language_loss`.

        Raises:
            TypeError: labels are missing.
        """
        alone = self.weight == 1
        needed = {f"labels_{track}" for track in self.heads.tracks} | (set() if alone else {"labels"})
        if missing := needed - inputs.keys():
            raise TypeError(f"inputs: expected labels of the language loss and of every track, got no {min(missing)}.")
        labels = {track: inputs.pop(f"labels_{track}") for track in self.heads.tracks}
        if alone:
            inputs = {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": 1}
        with last_hidden_state(self.model) as hidden:
            language = self.model(**inputs).loss
        residue = self.heads.loss(hidden(), labels)
        if alone:
            return {"loss": residue, "residue_loss": residue.detach()}
        loss = (1 - self.weight) * language + self.weight * residue.to(language.device)
        return {"loss": loss, "language_loss": language.detach(), "residue_loss": residue.detach()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, or not any more
                raise
            return getattr(self.model, name)


@contextmanager
def last_hidden_state(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """What the language model's last layer gives, behind the final norm, in a forward that is made anyway.

        with last_hidden_state(model) as hidden:
            loss = model(**batch, labels=labels).loss
        logits = heads(hidden())  # hidden() is [B, S, H], with its gradient; of the last call, if there were several

    It is read where the decoder returns it, so it is complete whether or not the logits are: with `logits_to_keep`, and
    with a fused loss (liger-kernel's) that never calls the output layer.

    Args:
        model: a language model of transformers, bare, in PEFT, DDP, FSDP or torch.compile, accelerated, checkpointed.

    Raises:
        ValueError: `model` holds no model of transformers.
        RuntimeError: (of `hidden()`) the model was not called in the block, or its decoder was left out or kept some
            positions only.
    """
    decoder = _decoder(model)
    kept: list[tuple[Tensor, tuple[int, ...]]] = []  # the hidden state and the shape [B, S] of the input, of one call

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")] + list(args)
        inputs = next(one for one in given if isinstance(one, Tensor))
        kept[:] = [(output[0], tuple(inputs.shape[:2]))]  # last_hidden_state comes first

    def hidden() -> Tensor:
        if not kept:
            raise RuntimeError(
                f"last_hidden_state: expected a call of the model in the block, its {type(decoder).__name__} was not"
                " called; call the model that was given, not a copy or another adapter's."
            )
        state, shape = kept[0]
        if state.shape[:2] != shape:
            raise RuntimeError(
                f"last_hidden_state: expected the positions {list(shape)} of the input, the model kept"
                f" {list(state.shape[:2])}; call it without logits_to_keep."
            )
        return state

    handle = decoder.register_forward_hook(keep, with_kwargs=True)
    try:
        yield hidden
    finally:
        handle.remove()


def _decoder(model: nn.Module) -> nn.Module:
    """The module whose output is the last hidden state of the text."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            decoder: nn.Module = module.get_decoder()
            return decoder
    raise ValueError(f"model: expected a language model of transformers, got a {type(model).__name__} without one.")


def _cross_entropy(logits: Tensor, targets: Tensor, track: str) -> Tensor:
    """Mean over the targets [n] that are not -100, for logits [n, C]; 0 if there are none."""
    known = targets != IGNORED
    if ((targets < 0) | (targets >= logits.shape[-1]))[known].any():
        raise ValueError(
            f"labels[{track!r}]: expected ids from 0 to {logits.shape[-1] - 1}, or {IGNORED}, got"
            f" {targets[known].min().item()} to {targets[known].max().item()}."
        )
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="sum")
    return total / known.sum().clamp(min=1)


def _dtype(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.weight.dtype
    return dtype


def _whole(tensor: Any) -> Tensor:
    """The tensor that FSDP2 has sharded; any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _listed(tracks: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({letters})" for name, letters in tracks.items())
