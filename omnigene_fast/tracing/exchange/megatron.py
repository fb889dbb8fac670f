"""Megatron-LM's router trace: JSON lines, one for each forward call and layer.

Schema, from NVIDIA/Megatron-LM (`megatron/core/transformer/moe/router_trace.py`, read by
`tools/moe_routing/analyze_routing_*.py`): files `router_trace_rank<r>.jsonl` of objects with step, stage
("pre_dispatch"), block ("decoder", or "mtp" with mtp_idx; older traces have no block), layer, rank, num_tokens, topk,
top_indices [num_tokens][topk], and offsets into sidecar files of hidden states and logits, which are not read.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..beside import new_directory, new_file
from .building import Labels, new_run, phase_number
from .files import OWN, check_routed, existing, json_lines, own_part, resolve_meta
from .responses import every_document, kinds_left_out, own_entry

if TYPE_CHECKING:
    from ..run import Run

_NAME = re.compile(r"router_trace_rank(\d+)\.jsonl")

Call = dict[int, tuple[str, NDArray[Any], dict[str, Any]]]  # layer -> where, ids [n, K], what we added


def export_megatron(run: "Run", path: str | os.PathLike[str]) -> list[str]:
    """Write a directory with the trace of rank 0: every document a step, `layer` its decoder index.

    Megatron's own scripts read it. They skip the key with labels and tokens that a document's first layer has.

    Returns:
        What was left out.
    """
    check_routed(run)
    with new_directory(path) as beside, new_file(beside / "router_trace_rank0.jsonl") as file:
        for step, (row, records) in enumerate(every_document(run)):
            own = own_entry(run, row, records, None, first=step == 0)
            own["token"] = records.token.tolist()
            for position, (layer, ids) in enumerate(zip(run.layers, records.ids, strict=True)):
                entry = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
                entry |= {"num_tokens": len(records), "topk": run.top_k, "top_indices": ids.tolist()}
                file.write(json.dumps(entry if position else {**entry, OWN: own}).encode() + b"\n")
    return kinds_left_out(run)


def import_megatron(
    source: Any,
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Labels = None,
    ranks: Collection[int] | None = None,
    layer_offset: int = 0,
    phase: str = "train",
) -> "Run":
    """Read a trace directory, or one file of it; every forward call is a document, labelled with its step and rank.

    The trace knows no documents, tokens or padding: all tokens of a call belong to one document and count. MTP layers
    are skipped. A step with several calls (micro-batches, recomputed ones too) has one document for each.

    Args:
        source, path, labels: as for `import_run`.
        meta: must hold num_experts; layers to check, or to put the trace's layers into an order.
        ranks: those to read, by default all. Ranks that route the same tokens (tensor parallelism) count twice.
        layer_offset: added to the trace's layer to get the decoder index: its numbers begin at 0 in each pipeline
            stage, and at 1 where a router was found by its layer_number.
        phase: of the tokens: train, prefill or decode.
    """
    from ..run import open_trace

    number = phase_number(phase)
    root = existing(source)
    calls = _calls(_files(root, ranks), layer_offset)
    first = next(calls, None)
    if first is None:
        raise ValueError(f"{root}: expected records of decoder layers, got none.")
    own = _own(first)
    found: dict[str, Any] = dict(own.get("meta") or {})
    found["top_k"] = _top_k(first[2])
    if "layers" not in found and "layers" not in (meta or {}):
        found["layers"] = sorted(first[2])
    resolved = resolve_meta(meta, found, "megatron", root)
    with new_run(path, resolved, labels) as builder:
        for rank, step, call in chain((first,), calls):
            where, ids = _stack(call, resolved["layers"], resolved["top_k"])
            added = next((added for _, _, added in call.values() if added), {})
            if not added:
                added = {"labels": {"step": str(step), "rank": str(rank)}}
            tokens = added.get("token")
            builder.add(where, ids, tokens, own=added, phase=np.full(len(ids), number))
        builder.finish(own.get("documents"))
    return open_trace(path)


def _files(root: Path, ranks: Collection[int] | None) -> list[Path]:
    if not root.is_dir():
        return [root]
    found = {int(match[1]): file for file in root.iterdir() if (match := _NAME.fullmatch(file.name))}
    if not found:
        raise ValueError(f"{root}: expected files named router_trace_rank<r>.jsonl, found none.")
    missing = sorted(set(ranks or ()) - found.keys())
    if missing:
        raise ValueError(f"ranks: expected some of {sorted(found)}, got {missing[0]}.")
    return [found[rank] for rank in sorted(found if ranks is None else ranks)]


def _calls(files: list[Path], layer_offset: int) -> Iterator[tuple[int, int, Call]]:
    """Rank, step and records of each forward call: the n-th record of a layer in a step belongs to its n-th call."""
    for file in files:
        now: tuple[int, int] | None = None
        calls: list[Call] = []
        for where, entry in json_lines(file):
            if entry.get("block", "decoder") != "decoder":
                continue
            rank, step, layer, ids = _record(entry, where)
            if (rank, step) != now:
                yield from ((*now, call) for call in calls) if now else ()
                now, calls = (rank, step), []
            layer += layer_offset
            call = next((call for call in calls if layer not in call), None)
            if call is None:
                call = {}
                calls.append(call)
            call[layer] = where, ids, own_part(entry, where)
        yield from ((*now, call) for call in calls) if now else ()


def _record(entry: Mapping[str, Any], where: str) -> tuple[int, int, int, NDArray[Any]]:
    numbers = [entry.get(key) for key in ("rank", "step", "layer", "num_tokens", "topk")]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(
            f"{where}: expected a record of Megatron's router trace with rank, step, layer, num_tokens and topk, got"
            f" the keys {sorted(entry)}."
        )
    rank, step, layer, n, K = (int(number) for number in numbers if number is not None)
    try:
        ids = np.asarray(entry.get("top_indices") or np.empty((0, K), np.int64))
    except ValueError:
        ids = np.empty(0)
    if ids.shape != (n, K) or ids.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected top_indices to be {n} lists of {K} integers, got others.")
    return rank, step, layer, ids


def _own(first: tuple[int, int, Call]) -> dict[str, Any]:
    return next((added for _, _, added in first[2].values() if added), {})


def _top_k(call: Call) -> int:
    return int(next(iter(call.values()))[1].shape[1])


def _stack(call: Call, layers: list[int], top_k: int) -> tuple[str, NDArray[Any]]:
    """Words that name a call, and its ids [n, L, K]."""
    where, first, _ = next(iter(call.values()))
    if call.keys() != set(layers):
        raise ValueError(
            f"{where}: expected a call through decoder layers {layers}, got one through {sorted(call)}; the ranks of a"
            " pipeline hold different layers, which cannot be joined: pass ranks= for one stage."
        )
    for other, ids, _ in call.values():
        if ids.shape != (len(first), top_k):
            raise ValueError(
                f"{other}: expected {len(first)} tokens and top {top_k}, as in the call's other layers, got"
                f" {list(ids.shape)}."
            )
    return where, np.stack([call[layer][1] for layer in layers], axis=1)
