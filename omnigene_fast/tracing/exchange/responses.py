"""Saved responses of SGLang and vLLM, one JSON object per line.

vLLM (`/v1/completions` or `/inference/v1/generate` with return_token_ids): `choices[].prompt_token_ids`,
`choices[].token_ids`, `choices[].routed_experts`; the chat endpoint and 0.21 have prompt_token_ids and
prompt_routed_experts beside `choices`. SGLang (`/generate`): `output_ids` and `meta_info` with prompt_tokens,
completion_tokens and routed_experts, or input_expert_ids and output_expert_ids with expert_ids_schema; the OpenAI
endpoints have these in `sglext` and the numbers in `usage`. Its responses do not repeat the prompt: an added key
`input_ids`, named as in the request, is read. Sources: `arrays`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..beside import new_file
from . import arrays
from .building import Labels, new_run
from .files import OWN, check_routed, existing, json_lines, own_part, portable_meta, resolve_meta

if TYPE_CHECKING:
    from ..records import Records
    from ..run import Run


@dataclass
class Sequences:
    """One sequence of a response."""

    where: str
    token: list[int]  # prompt and sampled ones, -1 where the response does not say
    prompt: int
    data: Any  # base64, nested lists or an array
    own: dict[str, Any]
    layers: list[int] | None = None  # those with experts, where the response says


def export_vllm(run: "Run", path: str | os.PathLike[str], *, num_hidden_layers: int | None = None) -> list[str]:
    """Write every document as a response of vLLM's /v1/completions with token ids and routed experts.

    Args:
        num_hidden_layers: as for `to_routed_experts`.

    Returns:
        What was left out.
    """

    def line(row: dict[str, Any], prompt: list[int], sampled: list[int], array: NDArray[Any]) -> dict[str, Any]:
        routed = arrays.encode_vllm(array)
        choice = {"index": 0, "prompt_token_ids": prompt, "token_ids": sampled, "routed_experts": routed}
        return {
            "id": f"doc-{row['doc_id']}",
            "object": "text_completion",
            "model": run.meta["model"],
            "choices": [choice],
        }

    return _export(run, path, num_hidden_layers, line)


def export_sglang(run: "Run", path: str | os.PathLike[str], *, num_hidden_layers: int | None = None) -> list[str]:
    """Write every document as a response of SGLang's /generate with routed experts, and the prompt as input_ids.

    Args:
        num_hidden_layers: as for `to_routed_experts`.

    Returns:
        What was left out.
    """

    def line(row: dict[str, Any], prompt: list[int], sampled: list[int], array: NDArray[Any]) -> dict[str, Any]:
        numbers = {"prompt_tokens": len(prompt), "completion_tokens": len(sampled)}
        info = {"id": f"doc-{row['doc_id']}", **numbers, "routed_experts": arrays.encode_sglang(array)}
        return {"input_ids": prompt, "output_ids": sampled, "meta_info": info}

    return _export(run, path, num_hidden_layers, line)


def import_vllm(
    source: Any,
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Labels = None,
    last: str = "unrouted",
    start: int = 0,
) -> "Run":
    """Read responses of vLLM; every choice is a document.

    Args:
        source, path, labels: as for `import_run`.
        meta: must hold num_experts; layers, last and start as for `from_routed_experts`.
    """
    return _import("vllm", _vllm, source, path, meta, labels, last, start)


def import_sglang(
    source: Any,
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Labels = None,
    last: str = "unrouted",
    start: int = 0,
) -> "Run":
    """Read responses of SGLang; every one is a document.

    Args:
        source, path, labels: as for `import_run`.
        meta: must hold num_experts and top_k; layers, last and start as for `from_routed_experts`.
    """
    return _import("sglang", _sglang, source, path, meta, labels, last, start)


def _export(
    run: "Run",
    path: str | os.PathLike[str],
    num_hidden_layers: int | None,
    line: Callable[[dict[str, Any], list[int], list[int], NDArray[Any]], dict[str, Any]],
) -> list[str]:
    if num_hidden_layers is not None and num_hidden_layers <= max(run.layers):
        raise ValueError(f"num_hidden_layers: expected more than {max(run.layers)}, got {num_hidden_layers}.")
    check_routed(run)
    with new_file(path) as file:
        for row, records in every_document(run):
            unrouted = _take_unrouted(row["labels"])
            prompt = int((records.phase != arrays.DECODE).sum())
            own = own_entry(run, row, records, prompt, first=not file.tell())
            own["last"] = "unrouted" if unrouted else "routed"
            token = records.token.tolist()
            sampled = token[prompt:] + unrouted
            array = arrays.spread(records.ids, run.layers, num_hidden_layers)
            entry = {**line(row, token[:prompt], sampled, array), OWN: own}
            file.write(json.dumps(entry).encode() + b"\n")
    return kinds_left_out(run)


def _take_unrouted(labels: dict[str, str]) -> list[int]:
    """The last token without a decision, which an import made a label: taken out if it is one."""
    text = labels.get(arrays.UNROUTED, "")
    if not (text.isascii() and text.isdecimal() and str(int(text)) == text and int(text) < 1 << 31):
        return []
    return [int(labels.pop(arrays.UNROUTED))]


def every_document(run: "Run", kinds: Sequence[str] = ("ids",)) -> Iterator[tuple[dict[str, Any], "Records"]]:
    """The documents with tokens as `iter_documents` has them, then those without; labels in a dict of their own."""
    known = run.gathered
    labels = known.label_rows()
    empty = None
    for row, records in run.iter_documents(kinds=kinds):
        empty = records if empty is None else empty
        at = int(np.searchsorted(known.doc_ids, row["doc_id"]))
        yield {"doc_id": row["doc_id"], "text_hash": row["text_hash"], "labels": labels[at]}, records
    if empty is None:
        raise ValueError(f"run: expected documents with tokens, got none in {run.name}.")
    for at in np.flatnonzero(known.n_tokens == 0).tolist():
        row = {"doc_id": int(known.doc_ids[at]), "text_hash": known.text_hash[at], "labels": labels[at]}
        yield row, empty.take(slice(0, 0))


def own_entry(
    run: "Run", row: Mapping[str, Any], records: "Records", prompt: int | None, *, first: bool
) -> dict[str, Any]:
    """What we add to the entry of a document.

    Args:
        prompt: number of tokens at the beginning that the entry marks as prompt; None if it marks no phases.
        first: the first entry of a file, which says what the run is.
    """
    own: dict[str, Any] = {key: row[key] for key in ("doc_id", "text_hash", "labels")}
    if (records.pos != np.arange(len(records))).any():
        own["pos"] = records.pos.tolist()
    if prompt is None or (records.phase != (np.arange(len(records)) >= prompt) * arrays.DECODE).any():
        own["phase"] = records.phase.tolist()
    return {**own, "meta": portable_meta(run), "documents": len(run.gathered)} if first else own


def kinds_left_out(run: "Run") -> list[str]:
    """A phrase for what is recorded of the tokens beside their ids."""
    kinds = [kind for kind in run.record if kind != "ids"]
    return [f"the tokens' {' and '.join(kinds)}"] if kinds else []


def _import(
    format: str,
    parse: Callable[[str, dict[str, Any]], Iterator[Sequences]],
    source: Any,
    path: str | os.PathLike[str],
    meta: Mapping[str, Any] | None,
    labels: Labels,
    last: str,
    start: int,
) -> "Run":
    from ..run import open_trace

    arrays.check_last(last)
    file = existing(source)
    sequences = (found for where, entry in json_lines(file) for found in parse(where, entry))
    first = next(sequences, None)
    if first is None:
        raise ValueError(f"{file}: expected responses as JSON lines, got none.")
    found: dict[str, Any] = dict(first.own.get("meta") or {})
    top_k = found.get("top_k", (meta or {}).get("top_k"))
    ids = _array(first, last, start, top_k)
    if len(ids):
        found["top_k"] = ids.shape[2]
    found.setdefault("layers", first.layers)
    if found["layers"] is None and "layers" not in (meta or {}):
        found["layers"] = list(range(ids.shape[1]))
    resolved = resolve_meta(meta, found, format, file)
    with new_run(path, resolved, labels) as builder:
        for sequence in chain((first,), sequences):
            ids = _array(sequence, last, start, resolved["top_k"])
            how = sequence.own.get("last", last)
            arrays.add_sequence(builder, sequence.where, ids, sequence.token, sequence.prompt, how, start, sequence.own)
        builder.finish(first.own.get("documents"))
    return open_trace(path)


def _array(sequence: Sequences, last: str, start: int, top_k: int | None) -> NDArray[Any]:
    last = sequence.own.get("last", last)
    arrays.check_last(last)
    data = sequence.data
    if not isinstance(data, str | np.ndarray):
        try:
            data = np.asarray(data)
        except ValueError:
            raise ValueError(f"{sequence.where}: expected lists [rows, layers, K], got ragged ones.") from None
    return arrays.as_array(data, len(sequence.token), last, start, top_k, sequence.where)


def _vllm(where: str, entry: dict[str, Any]) -> Iterator[Sequences]:
    choices = entry.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"{where}: expected a response of vLLM with choices, got the keys {sorted(entry)}.")
    own = own_part(entry, where)
    for index, choice in enumerate(choices):
        at = f"{where}, choice {index}"
        prompt = choice.get("prompt_token_ids")
        prompt = entry.get("prompt_token_ids") if prompt is None else prompt
        sampled, routed = choice.get("token_ids"), choice.get("routed_experts")
        if sampled is None or prompt is None:
            raise ValueError(
                f"{at}: expected prompt_token_ids and token_ids, got none of one; ask the server for them with"
                " return_token_ids."
            )
        if routed is None:
            raise ValueError(
                f"{at}: expected routed_experts, got none; start vLLM with --enable-return-routed-experts."
            )
        before = entry.get("prompt_routed_experts")
        if before is not None:
            parts = [_decoded(part, at) for part in (before, routed)]
            routed = np.concatenate([part for part in parts if len(part)] or parts[:1])
        yield Sequences(at, _tokens(prompt, at) + _tokens(sampled, at), len(prompt), routed, own)


def _decoded(part: Any, where: str) -> NDArray[Any]:
    if isinstance(part, str):
        return arrays.decode_routed_experts(part)
    array = np.asarray(part)
    if array.size and array.ndim != 3:
        raise ValueError(f"{where}: expected lists [rows, layers, K], got shape {list(array.shape)}.")
    return array


def _sglang(where: str, entry: dict[str, Any]) -> Iterator[Sequences]:
    info = entry.get("meta_info") or entry.get("sglext")
    numbers = {**(entry.get("usage") or {}), **(info if isinstance(info, dict) else {})}
    prompt, sampled = numbers.get("prompt_tokens"), numbers.get("completion_tokens")
    if not isinstance(info, dict) or not isinstance(prompt, int) or not isinstance(sampled, int):
        raise ValueError(
            f"{where}: expected a response of SGLang with prompt_tokens and completion_tokens in meta_info, got the"
            f" keys {sorted(entry)}."
        )
    own = own_part(entry, where)
    token = _tokens(entry.get("input_ids") or [-1] * prompt, where) + _tokens(
        entry.get("output_ids") or [-1] * sampled, where
    )
    if len(token) != prompt + sampled:
        raise ValueError(
            f"{where}: expected {prompt} input_ids and {sampled} output_ids, as the response says, got {len(token)} in"
            " total."
        )
    layers, data = None, info.get("routed_experts")
    schema = info.get("expert_ids_schema")
    if data is None and isinstance(schema, dict):
        data, layers = _partitions(info, schema, where)
    if data is None:
        raise ValueError(
            f"{where}: expected routed_experts, got none; start SGLang with --enable-return-routed-experts and ask for"
            " them with return_routed_experts."
        )
    yield Sequences(where, token, prompt, data, own, layers)


def _partitions(
    info: Mapping[str, Any], schema: Mapping[str, Any], where: str
) -> tuple[NDArray[Any], list[int] | None]:
    """The rows of prompt and output, one array, and the layers with experts."""
    parts = []
    for name in ("input", "output"):
        data = info.get(f"{name}_expert_ids")
        if not isinstance(data, str):
            raise ValueError(f"{where}: expected {name}_expert_ids, got none; ask for the input's and the output's.")
        rows, top_k = schema.get(f"{name}_num_rows"), schema.get("top_k")
        if not isinstance(rows, int) or not isinstance(top_k, int):
            raise ValueError(f"{where}: expected {name}_num_rows and top_k in expert_ids_schema, got {dict(schema)}.")
        parts.append(arrays.decode_routed_experts(data, rows=rows, top_k=top_k))
    layers = schema.get("moe_layer_ids")
    return np.concatenate([part for part in parts if len(part)] or parts[:1]), layers


def _tokens(values: Any, where: str) -> list[int]:
    if not isinstance(values, Sequence) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"{where}: expected a list of token ids, got {type(values).__name__}.")
    return list(values)
