"""Formats that hold counts alone: OmniGene-4's npz and DeepSeek's EPLB load matrix.

Schema of the npz, from maris205/omnigene4 (`analysis/20-collect_moe_activations.py` writes it,
`analysis/23-three_way_compare.py` reads it): for every task `<task>__counts`, int64 [L, E], and `<task>__tokens`,
int64 [1]. Its readers take what stands before the first `__` of each key as the task, so no other key may be there.
Of the matrix, from deepseek-ai/EPLB (`eplb.py`, `rebalance_experts`): `weight`, [layers, num_logical_experts].
"""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from ..beside import new_file
from .building import Labels, new_run
from .files import OWN, as_counts, check_layers, existing, reading, resolve_meta

if TYPE_CHECKING:
    from ..run import Run

COUNTS, TOKENS = "__counts", "__tokens"
_TOKENS_LEFT = "the tokens: positions, token ids, phases, expert ids, weights and statistics of each"


def task_key(task: str) -> str:
    """The name of a task in a key of the npz: percent-encoded where it would not come back.

    Letters of ASCII, digits and `-.~_` stand for themselves, everything else as its UTF-8 bytes (`%2F` for a slash);
    so do a dot at the beginning, for no key to be a path, and an underscore before another one or at the end, for the
    first `__` to end the name. `unquote` is the way back.
    """
    return re.sub(r"^\.", "%2E", re.sub(r"_(?=_|$)", "%5F", quote(task, safe="")))


def key_task(key: str) -> str:
    """The task that a name in a key stands for; a name that `task_key` would not have made stands for itself."""
    task = unquote(key)
    return task if task_key(task) == key else key


def export_npz(run: "Run", path: str | os.PathLike[str], *, by: str = "task") -> list[str]:
    """Write the counts and tokens of each value of a label, int64, compressed; keys as `task_key` encodes them.

    Decoder indices, K and the model's name stand in the comment of the zip archive, where numpy does not look.

    Args:
        by: name of the label.

    Returns:
        What was left out.

    Raises:
        ValueError: no document has the label.
    """
    if by not in _label_names(run):
        raise ValueError(f"by: expected a label of {run.name}, one of {_label_names(run)}, got {by!r}.")
    documents = run.documents
    values = documents[by]
    tasks = [task for task in dict.fromkeys(values) if task is not None]
    arrays: dict[str, NDArray[np.int64]] = {}
    for task in tasks:
        rows = np.flatnonzero(values == task)
        arrays[task_key(task) + COUNTS] = run.counts[rows].sum(axis=0, dtype=np.int64)
        arrays[task_key(task) + TOKENS] = np.array([documents["n_tokens"].iloc[rows].sum()], np.int64)
    keep = {key: run.meta[key] for key in ("layers", "num_experts", "top_k", "model")}
    with new_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = json.dumps({OWN: {**keep, "label": by}}).encode()
    others = [name for name in _label_names(run) if name != by]
    left = [_TOKENS_LEFT, f"single documents, summed up by {by}: their ids, text hashes and counts"]
    left += [f"the labels {', '.join(others)}"] if others else []
    missing = int(values.isna().sum())
    return left + ([f"{missing} documents without {by}"] if missing else [])


def import_npz(
    source: Any, path: str | os.PathLike[str], *, meta: Any = None, labels: Labels = None, label: str | None = None
) -> "Run":
    """Read the npz: one document per task, of which nothing but the counts is known.

    K is the number of picks for each token, which every task and layer must agree on. The file of others does not say
    which layers it holds: row i is taken for decoder layer i unless `meta` has layers.

    Args:
        source, path, meta, labels: as for `import_run`.
        label: the name of the label that becomes the task; by default the one that was exported, or "task".
    """
    file = existing(source)
    arrays: dict[str, NDArray[Any]] = {}
    with reading(file):
        if not zipfile.is_zipfile(file):
            np.load(file, allow_pickle=False)  # says what else it is
            raise ValueError("this is one array, not an archive of them")
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        with zipfile.ZipFile(file) as archive:
            comment = archive.comment
    own = _comment(comment, file)
    tasks = _tasks(arrays, file)
    counts = np.stack([task[1] for task in tasks])
    tokens = np.array([task[2] for task in tasks], np.int64)
    wanted = meta.get("top_k") if meta else None
    found: dict[str, Any] = {"num_experts": counts.shape[2], "layers": None, "top_k": _picks_per_token(counts, tokens)}
    found.update({key: own[key] for key in ("layers", "model") if key in own})
    if found["top_k"] is None:
        found["top_k"] = own.get("top_k", wanted)
    if found["layers"] is None and "layers" not in (meta or {}):
        found["layers"] = list(range(counts.shape[1]))
    resolved = resolve_meta(meta, found, "npz", file)
    name = label or own.get("label", "task")
    return _write(path, resolved, labels, counts, tokens, [{name: task[0]} for task in tasks], file)


def export_eplb(run: "Run", path: str | os.PathLike[str]) -> list[str]:
    """Write the picks of each expert over all documents, int64 [L, E], as .npy: `torch.from_numpy(np.load(path))`.

    Returns:
        What was left out.
    """
    with new_file(path) as file:
        np.save(file, run.counts.sum(axis=0, dtype=np.int64), allow_pickle=False)
    rows = "" if run.layers == list(range(len(run.layers))) else f": the rows are decoder layers {run.layers}"
    return [_TOKENS_LEFT, "the documents and their labels", f"the model, K and the layers' numbers{rows}"]


def import_eplb(source: Any, path: str | os.PathLike[str], *, meta: Any = None, labels: Labels = None) -> "Run":
    """Read the matrix [L, E] as one document of which nothing but the counts is known.

    Args:
        source, path, labels: as for `import_run`.
        meta: must hold top_k; row i is taken for decoder layer i unless it has layers. Every row must count the
            same tokens, K picks each: a matrix of averages or of a part of the picks is refused.
    """
    file = existing(source)
    with reading(file):
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("this is an archive, not one array")
    counts = as_counts(array, str(file))[None]
    layers = None if meta and "layers" in meta else list(range(counts.shape[1]))
    resolved = resolve_meta(meta, {"num_experts": counts.shape[2], "layers": layers}, "eplb", file)
    tokens = counts[0, 0].sum(keepdims=True, dtype=np.int64) // resolved["top_k"]
    return _write(path, resolved, labels, counts, tokens, [{}], file)


def _write(
    path: str | os.PathLike[str],
    meta: dict[str, Any],
    labels: Labels,
    counts: NDArray[np.int32],
    tokens: NDArray[np.int64],
    own: list[dict[str, str]],
    source: Path,
) -> "Run":
    from ..run import open_trace

    check_layers(meta["layers"], counts.shape[1], source)
    with new_run(path, meta, labels, record=()) as builder:
        builder.add_counts(str(source), counts, tokens, own)
    return open_trace(path)


def _tasks(arrays: dict[str, NDArray[Any]], file: Path) -> list[tuple[str, NDArray[np.int32], int]]:
    """Task, counts and tokens of each pair of keys."""
    found: dict[str, tuple[str, NDArray[np.int32], int]] = {}
    for key, array in arrays.items():
        stem = key.removesuffix(COUNTS)
        if stem == key:
            if not key.endswith(TOKENS) or key.removesuffix(TOKENS) + COUNTS not in arrays:
                raise ValueError(f"{file}: expected keys <task>{COUNTS} and <task>{TOKENS}, got {key!r}.")
            continue
        tokens = arrays.get(stem + TOKENS)
        if tokens is None or tokens.size != 1 or tokens.dtype.kind not in "iu" or not 0 <= int(tokens.item()) < 1 << 63:
            got = "none" if tokens is None else f"dtype {tokens.dtype}, shape {list(tokens.shape)}"
            raise ValueError(f"{file}: expected {stem + TOKENS!r} to be one number of tokens >= 0, got {got}.")
        task, counts = key_task(stem), as_counts(array, f"{file}, {key!r}")
        if task in found:
            raise ValueError(f"{file}: expected every task once, got {task!r} in two keys.")
        first = next(iter(found.values()), None)
        if first is not None and counts.shape != first[1].shape:
            raise ValueError(
                f"{file}, {key!r}: expected shape {list(first[1].shape)}, as for {first[0]!r}, got"
                f" {list(counts.shape)}."
            )
        found[task] = task, counts, int(tokens.item())
    if not found:
        raise ValueError(f"{file}: expected keys <task>{COUNTS} and <task>{TOKENS}, got none.")
    return list(found.values())


def _picks_per_token(counts: NDArray[np.int32], tokens: NDArray[np.int64]) -> int | None:
    """K as the first task with tokens has it; the writer checks it against every task and layer."""
    for picks, n in zip(counts[:, 0].sum(axis=1, dtype=np.int64).tolist(), tokens.tolist(), strict=True):
        if n:
            return max(1, round(picks / n))
    return None


def _comment(comment: bytes, file: Path) -> dict[str, Any]:
    """What `export_npz` left in the archive's comment; nothing in the comments of others."""
    begin = json.dumps({OWN: 0}).encode()[:-2]
    if not comment or comment[: len(begin)] != begin[: len(comment)]:
        return {}
    try:
        own = json.loads(comment)[OWN]
    except ValueError:
        raise ValueError(f"{file}: expected a whole archive, but its end is missing.") from None
    return own if isinstance(own, dict) else {}


def _label_names(run: "Run") -> list[str]:
    return sorted(run.gathered.labels)
