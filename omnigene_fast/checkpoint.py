"""Checkpoint directories: what one must hold, digests by which it is known wherever it lies, and loading it."""

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WHOLE = 1 << 20  # bytes of a tensor or file that are hashed whole, such as every router's
_STEP, _BLOCK = 1 << 21, 4096  # of a larger one: so many bytes in every so many, about 0.2 %
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
# Of tokenizer_config.json: what does not change the ids of a text.
_INCIDENTAL = ("name_or_path", "tokenizer_file", "chat_template", "model_max_length", "processor_class", "padding_side")
_AGAIN = "download it again, whole"


def check(path: Path, argument: str = "model") -> None:
    """Raise ValueError, in a sentence that begins with `argument` and names the file, unless a checkpoint is whole.

    Reads headers and sizes, no weights: whether config, weights and tokenizer are there, every shard of the index with
    its tensors and its full length, and none is a Git LFS pointer.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise ValueError(
            f"{argument}: expected a checkpoint directory with a config.json, got {got} at {str(path)!r}; give a"
            " directory that `save_pretrained` wrote, or a download of one."
        )
    _require(path / "config.json", argument)
    for file in sorted(path.glob("*.json")):
        if file.name in ("config.json", "generation_config.json", *_TOKENIZER):
            _json(file, argument)
    _tensors(path, _WEIGHTS, argument)
    if (path / "adapter_config.json").exists():  # transformers puts it on the model
        check_adapter(path, argument)
    found = [path / name for name in _TOKENIZER if (path / name).exists()]
    if not found:
        raise ValueError(
            f"{argument}: expected a tokenizer in {str(path)!r}, such as tokenizer.json, found none; copy one there."
        )
    for file in found:
        _require(file, argument)
    if (path / "tokenizer.json").exists() and "model" not in _json(path / "tokenizer.json", argument):
        raise ValueError(f"{argument}: expected a model in {str(path / 'tokenizer.json')!r}, found none; {_AGAIN}.")


def check_adapter(path: Path, argument: str = "adapter") -> None:
    """Raise ValueError, as `check` does, unless `path` is a whole PEFT adapter."""
    if not (path / "adapter_config.json").is_file():
        raise ValueError(f"{argument}: expected a directory with an adapter_config.json, got {str(path)!r}.")
    _json(path / "adapter_config.json", argument)
    _tensors(path, _ADAPTER, argument)


def digest(path: Path, argument: str = "model") -> str:
    """Hexadecimal digits that stand for the weights of a checkpoint, with its adapter if one lies in it.

    Of names, dtypes, shapes and content, sampled where a tensor is larger than 1 MiB; not of where the files lie, nor
    of how the tensors are spread over them. About 0.2 % is read: a change of single values may go unseen, one of a
    matrix does not.
    """
    files = _tensors(path, _WEIGHTS, argument)
    return _digest(files | (_tensors(path, _ADAPTER, argument) if (path / "adapter_config.json").exists() else {}))


def adapter_digest(path: Path, argument: str = "adapter") -> str:
    """Hexadecimal digits that stand for an adapter, its weights and its config."""
    config = {**_json(path / "adapter_config.json", argument), "base_model_name_or_path": None}
    return _digest(_tensors(path, _ADAPTER, argument), json.dumps(config, sort_keys=True).encode())


def tokenizer_digest(path: Path, argument: str = "model") -> str:
    """Hexadecimal digits that stand for the files that decide the ids of a text."""
    total = hashlib.blake2b(digest_size=8)
    for file in (path / name for name in _TOKENIZER):
        if file.is_file():
            data = file.read_bytes()
            if file.name == "tokenizer_config.json":
                config = _json(file, argument)
                data = json.dumps({k: v for k, v in config.items() if k not in _INCIDENTAL}, sort_keys=True).encode()
            total.update(f"{file.name} {len(data)} ".encode() + data)
    return total.hexdigest()


def load_tokenizer(path: Path, argument: str = "model", **options: Any) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        path: a directory that `check` has passed.
        argument: begins the sentence of an error.
        options: of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, or lacks its vocabulary.
    """
    from transformers import AutoTokenizer

    with _loading(f"{argument}: expected a tokenizer in {str(path)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    # Without its vocabulary transformers makes an empty one, to which every text is unknown.
    names = set(tokenizer.vocab_files_names.values())
    parts = sorted(names - {"tokenizer.json"})
    if names and not _has_vocabulary(path, parts):
        raise ValueError(
            f"{argument}: expected the tokenizer's {' or '.join(['tokenizer.json', *parts])} in {str(path)!r}, found no"
            f" vocabulary; {_AGAIN}."
        )
    return tokenizer


def _has_vocabulary(path: Path, parts: list[str]) -> bool:
    """Whether a tokenizer that is made of files has its one file, a sentencepiece model, or all `parts`."""
    if any(next(path.glob(pattern), None) for pattern in ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken")):
        return True
    return bool(parts) and all((path / name).is_file() for name in parts)


def load_model(path: Path, dtype: Any, device: Any, adapter: Path | None = None, argument: str = "model") -> Any:
    """The causal language model of a checkpoint, in eval mode.

    Args:
        path: a directory that `check` has passed.
        dtype, device: of the model.
        adapter: a PEFT adapter to put on it, that `check_adapter` has passed.
        argument: begins the sentence of an error.

    Raises:
        ValueError: it cannot be loaded, or lacks some of the model's weights, which transformers would make up.
    """
    from transformers import AutoModelForCausalLM

    with _loading(f"{argument}: expected a checkpoint of a causal language model in {str(path)!r}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if report["mismatched_keys"]:
        name, got, expected = min(report["mismatched_keys"])
        raise ValueError(
            f"{argument}: expected {name} of shape {list(expected)} in {str(path)!r}, as its config.json says, got"
            f" {list(got)}; give config and weights of one model."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{argument}: expected all weights of the model in {str(path)!r}, found none for {len(missing)}, such as"
            f" {missing[0]}; {_AGAIN}."
        )
    model = model.to(device).eval()
    if adapter is None:
        return model
    from peft import PeftModel

    with _loading(f"adapter: expected a PEFT adapter of the model in {str(adapter)!r}"), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # they would stay as they were made
        return PeftModel.from_pretrained(model, adapter).eval()


@contextmanager
def _loading(expected: str) -> Iterator[None]:
    """One sentence for whatever goes wrong in the libraries that read a checkpoint."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{expected}, but loading it failed: {type(error).__name__}: {said[:300]}; {_AGAIN}, or save it again"
            " with the installed transformers."
        ) from error


# Name of a tensor or file, to: the file, first byte, bytes, and what else is known of it.
Tensors = dict[str, tuple[Path, int, int, str]]


def _tensors(path: Path, names: tuple[str, ...], argument: str) -> Tensors:
    """The tensors in the weights that transformers or PEFT would read, the first of `names` that is there."""
    name = next((name for name in names if os.path.lexists(path / name)), None)
    if name is None:
        raise ValueError(
            f"{argument}: expected weights in {str(path)!r}, one of {', '.join(names)}, found none; {_AGAIN}."
        )
    if not name.endswith(".index.json"):
        return _of_file(path / name, argument)
    places = _json(path / name, argument).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{argument}: expected a weight_map in {str(path / name)!r}, found none; {_AGAIN}.")
    shards = sorted(set(places.values()))
    absent = [shard for shard in shards if not (path / shard).is_file()]
    if absent:
        raise ValueError(
            f"{argument}: expected the {len(shards)} files that {str(path / name)!r} lists, found no {absent[0]}"
            f"{f' and {len(absent) - 1} others' if len(absent) > 1 else ''}; {_AGAIN}."
        )
    found: Tensors = {}
    for shard in shards:
        here = _of_file(path / shard, argument)
        wanted = [tensor for tensor, file in places.items() if file == shard and tensor not in here]
        if shard.endswith(".safetensors") and wanted:
            raise ValueError(
                f"{argument}: expected the tensor {wanted[0]} in {str(path / shard)!r}, as {name} says, found none;"
                f" {_AGAIN}."
            )
        found |= here
    return found


def _of_file(file: Path, argument: str) -> Tensors:
    _require(file, argument)
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        return _of_safetensors(file, size, argument)
    with open(file, "rb") as opened:
        legacy = opened.read(1) == pickle.PROTO
    if legacy:
        return {file.name: (file, 0, size, "")}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [(each.filename.partition("/")[2], each.file_size, each.CRC) for each in archive.infolist()]
    except zipfile.BadZipFile:
        raise ValueError(
            f"{argument}: expected whole weights of PyTorch in {str(file)!r}, got a damaged file; {_AGAIN}."
        ) from None
    return {file.name: (file, 0, size, json.dumps(sorted(entries)))}  # their checksums tell more than samples


def _of_safetensors(file: Path, size: int, argument: str) -> Tensors:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors: Tensors = {}
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            tensors[name] = file, 8 + length + first, end - first, f"{tensor['dtype']} {tensor['shape']}"
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{argument}: expected a whole safetensors file at {str(file)!r}, got {size:,} bytes without a readable"
            f" header; {_AGAIN}."
        ) from None
    if size != expected:
        raise ValueError(
            f"{argument}: expected {expected:,} bytes in {str(file)!r}, as its header says, got {size:,}; {_AGAIN}."
        )
    return tensors


def _require(file: Path, argument: str) -> None:
    """Raise ValueError unless `file` is there and holds something that is not a Git LFS pointer."""
    if not file.is_file():
        got = "a link to what is not there" if file.is_symlink() else "none"
        raise ValueError(
            f"{argument}: expected a checkpoint directory with a {file.name}, got {got} in {str(file.parent)!r};"
            f" {_AGAIN}."
        )
    with open(file, "rb") as opened:
        start = opened.read(64)
    if not start:
        raise ValueError(f"{argument}: expected content in {str(file)!r}, got an empty file; {_AGAIN}.")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{argument}: expected the content of {str(file)!r}, got a Git LFS pointer to it; run `git lfs pull` in"
            f" {str(file.parent)!r}."
        )


def _json(file: Path, argument: str) -> Mapping[str, Any]:
    _require(file, argument)
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict):
            return found
        got = type(found).__name__
    except (ValueError, RecursionError) as error:
        got = f"an error: {error}"
    raise ValueError(f"{argument}: expected a JSON object in {str(file)!r}, got {got}; {_AGAIN}.")


def _digest(tensors: Tensors, start: bytes = b"") -> str:
    total = hashlib.blake2b(start, digest_size=16)
    for name in sorted(tensors):
        file, first, size, said = tensors[name]
        total.update(f"{name} {size} {said} ".encode())
        with open(file, "rb", buffering=0) as opened:
            handle = opened.fileno()
            if size <= _WHOLE:
                total.update(os.pread(handle, size, first))
            else:
                for at in (*range(0, size - _BLOCK, _STEP), size - _BLOCK):
                    total.update(os.pread(handle, _BLOCK, first + at))
    return total.hexdigest()
