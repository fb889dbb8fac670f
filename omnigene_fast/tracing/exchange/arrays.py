"""Routed-experts arrays of inference engines, in memory: [rows, layers, K] expert ids for one sequence.

Shapes and encodings, from vllm-project/vllm (`vllm/outputs.py`, `vllm/entrypoints/openai/completion/protocol.py`,
`tests/entrypoints/openai/test_return_routed_experts.py`) and sgl-project/sglang
(`python/sglang/srt/layers/moe/routed_experts_capturer.py`, later `state_capturer/routed_experts.py`,
`test/registered/rl/test_return_routed_experts.py`):

- rows: prompt and sampled tokens in order. The last sampled token was never fed to the model, so that a sequence of n
  tokens has n - 1 rows; a sequence that was fed whole has n. Which one it is, the caller says (`last`).
- layers: those with experts (vLLM), or all decoder layers, with zeros for dense ones (SGLang, vLLM before 0.21).
- vLLM: base64 of the bytes of an .npy file, uint8, uint16, int16 or int32 by version; SGLang: base64 of the int32
  values alone, row-major, little-endian.
"""

import base64
import binascii
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .building import Builder, Labels, new_run
from .files import check_layers, check_routed, reading, resolve_meta

if TYPE_CHECKING:
    from ..run import Run

LAST = ("unrouted", "routed")
UNROUTED = "unrouted_token"  # the label that keeps the id of a last token without a decision
DECODE = 1  # in PHASES
_NPY = b"\x93NUMPY"  # as an int32 far above every expert id, so that the two encodings cannot be confused


def encode_vllm(array: NDArray[Any]) -> str:
    """An array [rows, layers, K] as vLLM's responses hold it: base64 of an .npy file, int32."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.dtype("<i4")), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def encode_sglang(array: NDArray[Any]) -> str:
    """An array [rows, layers, K] as SGLang's responses hold it: base64 of its int32 values, without the shape."""
    return base64.b64encode(np.ascontiguousarray(array, np.dtype("<i4")).tobytes()).decode("ascii")


def decode_routed_experts(data: str, *, rows: int | None = None, top_k: int | None = None) -> NDArray[Any]:
    """The array of either encoding.

    Args:
        data: base64 text.
        rows, top_k: tokens with a decision, and K; both needed for SGLang's encoding, which has no shape.

    Returns:
        [rows, layers, K] integers.

    Raises:
        ValueError: no base64, a truncated array, a pickled one, or values that do not fill whole rows.
    """
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"routed experts: expected base64, got {str(error).rstrip('.')}.") from None
    if raw.startswith(_NPY):
        stream = io.BytesIO(raw)
        with reading("routed experts"):
            array: NDArray[Any] = np.load(stream, allow_pickle=False)
        if array.ndim != 3:
            raise ValueError(f"routed experts: expected shape [rows, layers, K], got {list(array.shape)}.")
        return array
    if rows is None or not isinstance(top_k, int) or top_k < 1:
        raise ValueError("routed experts: expected rows and top_k, since these values come without a shape.")
    if len(raw) % 4 or (len(raw) // 4) % max(1, rows * top_k) or bool(rows) != bool(raw):
        raise ValueError(
            f"routed experts: expected int32 values for {rows} tokens with a decision and top {top_k} in each layer,"
            f" got {len(raw)} bytes; a response is one row short of its tokens, and last='routed' says that it is not."
        )
    return np.frombuffer(raw, "<i4").reshape(rows, -1, top_k) if rows else np.empty((0, 0, top_k), np.int32)


def from_routed_experts(
    arrays: Iterable[NDArray[Any] | str],
    token_ids: Iterable[Sequence[int]],
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any],
    prompt_lengths: Iterable[int] | None = None,
    last: str = "unrouted",
    start: int = 0,
    labels: Labels = None,
) -> "Run":
    """Write routed-experts arrays, one sequence each, as a new run.

    Args:
        arrays: [rows, layers, K] integers of each sequence, or either engine's base64 of them.
        token_ids: its tokens, prompt and sampled ones.
        path: directory of the new run.
        meta: num_experts, for SGLang's base64 top_k, and whatever else meta.json is to hold. layers are the decoder
            indices with experts, by default 0, 1, ...; of arrays over all decoder layers these columns are taken, and
            the others must be zero.
        prompt_lengths: how many of the tokens are the prompt: phase prefill, the others decode; by default all.
        last: "unrouted" if the last token was sampled and not fed, so that the array is one row short, or "routed".
        start: tokens at the beginning for which the engine was asked to leave out the rows
            (`routed_experts_prompt_start`, `routed_experts_start_len`).
        labels: as for `import_run`. The id of an unrouted last token becomes the label unrouted_token.

    Raises:
        FileExistsError: something is at `path`.
        ValueError, TypeError: numbers of rows, layers or experts that do not agree; nothing was written.
    """
    from ..run import open_trace

    check_last(last)
    sequences = zip_longest(arrays, token_ids, () if prompt_lengths is None else prompt_lengths)
    given = None if meta.get("layers") is None else [int(layer) for layer in meta["layers"]]
    first = next(sequences, None)
    if first is None:
        raise ValueError("arrays: expected at least one sequence, got none.")
    _check_sequence(0, first, prompt_lengths)
    ids = as_array(first[0], len(first[1]), last, start, meta.get("top_k"), "arrays[0]")
    resolved = resolve_meta(
        meta, {"layers": given or list(range(ids.shape[1])), "top_k": ids.shape[2]}, "array", "arrays"
    )
    with new_run(path, resolved, labels) as builder:
        for row, sequence in enumerate(chain((first,), sequences)):
            _check_sequence(row, sequence, prompt_lengths)
            (array, token, prompt), where = sequence, f"arrays[{row}]"
            ids = as_array(array, len(token), last, start, resolved["top_k"], where)
            prompt = len(token) if prompt is None else prompt
            add_sequence(builder, where, ids, token, prompt, last, start, {})
        builder.finish()
    return open_trace(path)


def _check_sequence(row: int, sequence: tuple[Any, ...], prompt_lengths: Any) -> None:
    if any(part is None for part in (sequence if prompt_lengths is not None else sequence[:2])):
        raise ValueError(
            f"arrays, token_ids, prompt_lengths: expected one of each for every sequence, got one missing at {row}."
        )


def to_routed_experts(
    run: "Run", *, num_hidden_layers: int | None = None
) -> Iterator[tuple[dict[str, Any], NDArray[np.int32], NDArray[np.int32]]]:
    """The routed-experts array of every document with tokens, in memory one at a time.

    Args:
        num_hidden_layers: the second axis is all decoder layers, zero for those without experts, as SGLang has it;
            by default the recorded layers in the order of `run.layers`.

    Returns:
        For each: its row of `run.documents`, its token ids [n] and int32 ids [n, layers, K], every row of them a token
        that was fed: there is no further token at the end.
    """
    if num_hidden_layers is not None and num_hidden_layers <= max(run.layers):
        raise ValueError(f"num_hidden_layers: expected more than {max(run.layers)}, got {num_hidden_layers}.")
    check_routed(run)
    return (
        (row, records.token, spread(records.ids, run.layers, num_hidden_layers))
        for row, records in run.iter_documents()
    )


def spread(ids: NDArray[Any], layers: Sequence[int], num_hidden_layers: int | None) -> NDArray[np.int32]:
    """ids [L, n, K] as [n, L, K], or as [n, num_hidden_layers, K] with zeros."""
    rows = ids.transpose(1, 0, 2)
    if num_hidden_layers is None:
        return rows.astype(np.int32)
    wide = np.zeros((rows.shape[0], num_hidden_layers, rows.shape[2]), np.int32)
    wide[:, list(layers)] = rows
    return wide


def check_last(last: str) -> None:
    """Raise ValueError unless `last` is one of LAST."""
    if last not in LAST:
        raise ValueError(f"last: expected one of {', '.join(LAST)}, got {last!r}.")


def rows_expected(tokens: int, last: str, start: int) -> int:
    """Rows of an array for so many tokens."""
    if start < 0:
        raise ValueError(f"start: expected a number of tokens >= 0, got {start}.")
    return max(0, tokens - start - (last == "unrouted"))


def as_array(
    array: NDArray[Any] | str, tokens: int, last: str, start: int, top_k: int | None, where: str
) -> NDArray[Any]:
    """One sequence's array, decoded, of the right number of rows.

    Raises:
        ValueError: it has others, in a sentence that says what the last token has to do with it.
    """
    rows = rows_expected(tokens, last, start)
    if isinstance(array, str):
        try:
            array = decode_routed_experts(array, rows=rows, top_k=top_k)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    array = np.asarray(array)
    if array.ndim != 3:
        raise ValueError(f"{where}: expected shape [rows, layers, K], got {list(array.shape)}.")
    if len(array) != rows:
        other = LAST[1 - LAST.index(last)]
        way = f"; last={other!r} would be {rows_expected(tokens, other, start)}"
        raise ValueError(
            f"{where}: expected {rows} rows for {tokens} tokens from {start} on, the last one {last}, got {len(array)}"
            f"{way}."
        )
    return array


def pick_columns(ids: NDArray[Any], layers: Sequence[int], where: str) -> NDArray[Any]:
    """[rows, L, K] of the recorded layers, of an array over them or over all decoder layers.

    Raises:
        ValueError: neither one, or decisions in a layer that is not among them.
    """
    width = ids.shape[1]
    if width == len(layers) or not len(ids):
        return ids if len(ids) else np.empty((0, len(layers), ids.shape[2]), ids.dtype)
    if width <= max(layers):
        check_layers(list(layers), width, where)
    rest = np.delete(ids, list(layers), axis=1)
    if rest.any():
        other = np.delete(np.arange(width), list(layers))[int(rest.any(axis=(0, 2)).argmax())]
        raise ValueError(
            f"{where}: expected zeros in decoder layers other than meta's layers {list(layers)}, got experts in layer"
            f" {other}."
        )
    return ids[:, list(layers)]


def add_sequence(
    builder: Builder,
    where: str,
    ids: NDArray[Any],
    token: Sequence[int],
    prompt: int,
    last: str,
    start: int,
    own: Mapping[str, Any],
) -> None:
    """Add a sequence whose array has the right number of rows.

    Args:
        token: prompt and sampled tokens; the last one is not among the rows if `last` is "unrouted".
        prompt: how many of them are the prompt.
        own: as for `Builder.add`.
    """
    if not 0 <= prompt <= len(token):
        raise ValueError(f"{where}: expected a prompt of 0 to {len(token)} tokens, got {prompt}.")
    fed = token[start : start + len(ids)]
    at = np.arange(start, start + len(ids))
    if last == "unrouted" and len(token) and token[-1] >= 0:
        own = {**own, "labels": {**own.get("labels", {}), UNROUTED: str(int(token[-1]))}}
    layers = builder.layers
    builder.add(where, pick_columns(ids, layers, where), fed, own=own, pos=at, phase=(at >= prompt) * DECODE)
