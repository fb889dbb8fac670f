"""Router traces in the formats of others: a run written as one of them, and one of them read as a run.

A format that has no place for something is not stretched: `export_run` says what it left out. Where its readers skip
what they do not know, a key "omnigene_fast" carries the rest (document ids, labels, decoder indices), and
`import_run` takes it from there.
"""

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .arrays import (
    decode_routed_experts,
    encode_sglang,
    encode_vllm,
    from_routed_experts,
    to_routed_experts,
)

if TYPE_CHECKING:
    from ..run import Run

__all__ = [
    "FORMATS",
    "decode_routed_experts",
    "encode_sglang",
    "encode_vllm",
    "export_run",
    "from_dataset",
    "from_routed_experts",
    "import_run",
    "to_dataset",
    "to_routed_experts",
]

logger = logging.getLogger("omnigene_fast")

FORMATS = {
    "npz": "OmniGene-4's counts: <task>__counts [L, E] and <task>__tokens [1] per task, one .npz file",
    "datasets": "Hugging Face datasets: a directory of Parquet files, one row per document",
    "eplb": "DeepSeek EPLB's load statistics: weight [L, E], one .npy file",
    "sglang": "SGLang's /generate responses with meta_info.routed_experts, one JSON line each",
    "vllm": "vLLM's /v1/completions responses with choices[].routed_experts, one JSON line each",
    "megatron": "Megatron-LM's router trace: a directory of router_trace_rank<r>.jsonl files",
}
_MODULES = {"npz": "counts", "eplb": "counts", "datasets": "dataset", "sglang": "responses", "vllm": "responses"}
_LATER = {"from_dataset": "dataset", "to_dataset": "dataset"}


def export_run(run: "Run", path: str | os.PathLike[str], format: str, **options: Any) -> list[str]:
    """Write a run in another format, beside and then renamed: whole or not at all.

    Args:
        run: an opened run.
        path: the new file or directory; nothing may be there.
        format: a key of `FORMATS`.
        options: of the format: see `export_<format>` in this package.

    Returns:
        What the format cannot hold and was left out, a phrase each; it is logged too.

    Raises:
        FileExistsError: something is at `path`.
        ValueError: no such format, or a run that lacks what it needs.
    """
    left_out: list[str] = _function("export", format, options)(run, path, **options)
    if left_out:
        logger.info("%s: %s does not hold %s", path, format, "; ".join(left_out))
    return left_out


def import_run(
    source: Any,
    path: str | os.PathLike[str],
    format: str,
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    **options: Any,
) -> "Run":
    """Read another format into a new run directory, written beside and then renamed: whole or not at all.

    Args:
        source: file or directory of the format; for "datasets" also a Dataset or IterableDataset.
        path: directory of the new run; it must not exist or be empty.
        format: a key of `FORMATS`.
        meta: what meta.json is to hold and `source` does not say: num_experts, top_k, layers (the decoder index of
            every layer that the source holds, in its order; 0, 1, ... by default), model, and whatever else. What the
            source does say of the shape must agree.
        labels: name -> value for every document, or one such mapping per document, in the order of the source.
        options: of the format: see `import_<format>` in this package.

    Raises:
        FileExistsError: something is at `path`.
        FileNotFoundError: nothing is at `source`.
        ValueError, TypeError: a damaged or foreign source, or one that does not agree with `meta`; nothing was written.
    """
    run: Run = _function("import", format, options)(source, path, meta=meta, labels=labels, **options)
    return run


def _function(verb: str, format: str, options: Collection[str]) -> Callable[..., Any]:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}.")
    module = importlib.import_module(f".{_MODULES.get(format, format)}", __name__)
    function: Callable[..., Any] = getattr(module, f"{verb}_{format}")
    known = [name for name, it in inspect.signature(function).parameters.items() if it.kind is it.KEYWORD_ONLY]
    strange = [name for name in options if name not in known]
    if strange:
        known = [name for name in known if name not in ("meta", "labels")]
        raise ValueError(f"options: expected those of {format}, {', '.join(known) or 'none'}, got {strange[0]!r}.")
    return function


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
