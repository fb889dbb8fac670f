"""What the formats share: what a run says of itself, JSON lines, numpy files."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import layout, lines
from ..records import unrouted_fault

if TYPE_CHECKING:
    from ..run import Run

OWN = "omnigene_fast"  # the key of what we add to a format; its other readers skip it
_SHAPE = ("layers", "num_experts", "top_k")
_PRIVATE = ("format", "record", "imported")  # what meta.json says of a directory and not of the trace


def portable_meta(run: "Run") -> dict[str, Any]:
    """What a run says of the trace, for a format that can carry it."""
    return {key: value for key, value in run.meta.items() if key not in _PRIVATE}


def check_routed(run: "Run") -> None:
    """Raise ValueError unless every token has experts in every layer: an engine takes any id for an expert's."""
    run.check_kinds(("ids",))
    if fault := unrouted_fault(run.layers, run.unrouted.tolist()):
        raise ValueError(f"{run.path}: {fault} This format holds experts alone; the datasets format keeps such tokens.")


def resolve_meta(
    given: Mapping[str, Any] | None, found: Mapping[str, Any], format: str, source: object
) -> dict[str, Any]:
    """meta.json of an imported run: what the source says, and for the rest what the caller does.

    Args:
        given: the caller's `meta`.
        found: what `source` says; None stands for nothing.

    Raises:
        ValueError: they do not agree on the shape, or neither says it.
    """
    name = Path(source).name if isinstance(source, str | os.PathLike) else type(source).__name__
    meta = {key: value for key, value in found.items() if value is not None and key not in _PRIVATE}
    for key, value in (given or {}).items():
        if key == "layers" and not isinstance(value, str):
            value = [int(layer) for layer in value]
        if key in _SHAPE and key in meta and meta[key] != value:
            raise ValueError(f"meta: expected {key} {meta[key]!r}, as {name} says, got {value!r}.")
        meta[key] = value
    for key in _SHAPE:
        if key not in meta:
            raise ValueError(f"meta: expected {key}, which {name} does not say; pass meta={{{key!r}: ...}}.")
    meta.setdefault("model", "unknown")
    meta["imported"] = {"format": format, "source": name}
    layout.check_meta({**meta, "record": []}, "meta")
    return meta


def check_layers(layers: list[int], rows: int, source: object) -> None:
    """Raise ValueError unless there is one decoder index for each of the layers that a source holds."""
    if len(layers) != rows:
        raise ValueError(
            f"meta: expected layers to hold {rows} decoder indices, one for each layer of {source}, got {len(layers)}."
        )


def existing(source: Any) -> Path:
    """`source` as the path of something that is there."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path, got {type(source).__name__}.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a trace to import, found nothing there.")
    return path


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with the words that name its line; a list counts as its items.

    Raises:
        ValueError: a line that is not JSON, such as the last one of a truncated file, or holds something else.
    """
    for _, where, entry in lines.json_lines(path, "source"):
        for item in entry if isinstance(entry, list) else [entry]:
            if not isinstance(item, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(item).__name__}.")
            yield where, item


def own_part(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an export of ours added to an object; nothing in those of others."""
    own = entry.get(OWN, {})
    if not isinstance(own, dict):
        raise ValueError(f"{where}: expected {OWN} to be an object, got {type(own).__name__}.")
    if not isinstance(own.get("meta", {}), dict):
        raise ValueError(f"{where}: expected meta to be an object, got {type(own['meta']).__name__}.")
    return own


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn what goes wrong while numpy reads a file into a sentence that names it; what is pickled is refused."""
    try:
        yield
    except (ValueError, EOFError, OSError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        text = layout.first_line(error)
        if "pickle" in text:
            raise ValueError(
                f"{where}: expected arrays of numbers, got pickled objects or no numpy file; neither is read."
            ) from None
        raise ValueError(f"{where}: expected whole numpy arrays, but reading them failed: {text}.") from None


def as_counts(array: NDArray[Any], where: str) -> NDArray[np.int32]:
    """[L, E] picks, checked before they are cast: integers, or floating point numbers that are whole.

    Raises:
        TypeError: no numbers.
        ValueError: another rank, negative numbers, fractions, more than int32 holds.
    """
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{where}: expected numbers, got dtype {array.dtype}.")
    if array.ndim != 2:
        raise ValueError(f"{where}: expected shape [layers, experts], got {list(array.shape)}.")
    if array.size:
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= np.iinfo(np.int32).max):
            raise ValueError(f"{where}: expected picks from 0 to 2**31 - 1, got {low} to {high}.")
        if array.dtype.kind == "f" and (array != np.trunc(array)).any():
            raise ValueError(f"{where}: expected whole numbers of picks, got fractions; a scaled load is no count.")
    return array.astype(np.int32)
