"""Tile tables: the tiles of the expert GEMMs by device and rows per expert, as JSON files that people can read.

| file                                        | holds                                                        |
|---------------------------------------------|--------------------------------------------------------------|
| kernels/tuned/sm_90.json                    | an architecture's tiles, predicted                           |
| kernels/tuned/<device>.json                 | a device's tiles, measured by us                             |
| ~/.cache/omnigene-fast/tuned/<device>.json  | a device's tiles, measured by `omnigene-fast tune`           |

A table has `version`, `arch` (compute capabilities; the numbers are for the first, the others borrow them), `source`
("predicted", with `why`, or "measured", with `date`, `versions`, `command`), a measured one `device`, and `buckets`. A
bucket has `dtype` ("half", "float32"), `rows_per_expert`, six `tiles`, and where it serves only one of two classes
`aligned`, `lora` (true, false) or `weights` ("same", "8bit"). The nearest bucket by the logarithm of the rows is taken.
"""

import json
import logging
import math
import os
import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from .._cache import cache_folder

logger = logging.getLogger("omnigene_fast")
VERSION = 1
COMMITTED = Path(__file__).parent / "tuned"
VARIABLE = "OMNIGENE_FAST_TUNED"


@dataclass(frozen=True)
class Tile:
    """Tile of one GEMM program: rows, columns, reduction step; warps; software-pipeline stages; whether a low-rank
    update goes on in the GEMM's accumulator, which takes fewer registers; whether weights come by TMA descriptors;
    whether programs are as many as multiprocessors and take tile after tile."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    chain: bool = True
    tma: bool = False
    persistent: bool = False

    def for_rank(self, rank: int) -> "Tile":
        """The same with no more columns than a multiple of 16 needs: the largest power of two that divides `rank`."""
        return replace(self, block_n=min(self.block_n, rank & -rank))


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles of the expert GEMMs. Those over rows share one tile table and so one `block_m`."""

    up: Tile
    down: Tile  # and the gradient of hidden, d_pre @ gate_up_proj: the same kernel
    down_bwd: Tile
    low_rank: Tile  # rows times a low-rank factor; the tile of rank 64 and more
    gram: Tile  # gradients of the projections
    low_rank_gram: Tile  # gradients of low-rank factors; the tile of rank 64 and more

    def __post_init__(self) -> None:
        rows = {tile.block_m for tile in (self.up, self.down, self.down_bwd, self.low_rank)}
        if len(rows) != 1:
            raise ValueError(f"up, down, down_bwd and low_rank must share block_m, got {sorted(rows)}.")

    @property
    def block_m(self) -> int:
        return self.up.block_m


class Kind(NamedTuple):
    """What a bucket serves: operands' dtype, 16-byte alignment, low-rank updates, weights as stored."""

    dtype: str  # "half" or "float32"
    aligned: bool
    lora: bool
    weights: str  # "same" as the rows' dtype, or "8bit"


KINDS = tuple(Kind(*kind) for kind in product(("half", "float32"), (True, False), (False, True), ("same", "8bit")))
KERNELS = tuple(field.name for field in fields(ExpertTiles))
_CHOICES = {"aligned": (True, False), "lora": (True, False), "weights": ("same", "8bit")}
_POWERS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 256), "warps": (1, 16)}
_PROVENANCE = {"predicted": ("why",), "measured": ("device", "date", "versions", "command")}
_NOTES = ("why", "source", "microseconds")  # of a bucket


@dataclass(frozen=True)
class Bucket:
    """One entry of a table. None: it serves both."""

    dtype: str
    rows_per_expert: float
    tiles: ExpertTiles
    aligned: bool | None = None
    lora: bool | None = None
    weights: str | None = None
    note: dict[str, Any] | None = None  # why, source, microseconds: read by people

    def serves(self, kind: Kind) -> bool:
        return self.dtype == kind.dtype and all(
            getattr(self, name) in (None, getattr(kind, name)) for name in ("aligned", "lora", "weights")
        )


@dataclass(frozen=True)
class Table:
    """A table as read from `path`."""

    path: Path
    arch: tuple[int, ...]
    source: str
    device: str | None
    header: dict[str, Any]  # all fields but the buckets
    buckets: tuple[Bucket, ...]

    def nearest(self, kind: Kind, rows_per_expert: int) -> Bucket | None:
        """The bucket of `kind` whose rows are nearest by their logarithm; None if no bucket serves `kind`."""
        logarithm = math.log2(max(rows_per_expert, 1))
        serving = [bucket for bucket in self.buckets if bucket.serves(kind)]
        return min(serving, key=lambda bucket: abs(math.log2(bucket.rows_per_expert) - logarithm), default=None)


def device_file(device: str) -> str:
    """The name of a device's table: "NVIDIA H100 80GB HBM3" has nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def user_file(device: str) -> Path | None:
    """Where this user's table of `device` is or would be; OMNIGENE_FAST_TUNED names another file or a directory, which
    ends with a slash if it does not exist yet, and empty means none."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return cache_folder("tuned") / device_file(device)
    if not named:
        return None
    path = Path(named).expanduser()
    folder = named.endswith(("/", os.sep)) or path.is_dir()
    return path / device_file(device) if folder else path


@lru_cache(maxsize=64)
def tables(arch: int, device: str | None = None) -> tuple[Table, ...]:
    """The tables to ask in this order: the user's of `device`, the committed one of `device`, that of `arch`.

    Read once per process. Empty for an architecture that no table is for. The log says once what a device runs on.
    """
    found = []
    if device is not None:
        user = user_file(device)
        table = _user_table(user, device) if user is not None else None
        committed = COMMITTED / device_file(device)
        found += [table] if table else []
        found += [read(committed)] if committed.exists() else []
    found += [table for table in committed_tables(arch) if table.device is None]
    if device is not None and (not found or found[0].source != "measured"):
        held = f"those predicted for it ({found[0].path.name})" if found else "those of sm_80, the most conservative"
        level = logging.INFO if found else logging.WARNING
        logger.log(
            level, "no tiles were measured on %s (sm_%d): taking %s; `omnigene-fast tune` measures", device, arch, held
        )
    return tuple(found)


@lru_cache(maxsize=64)
def committed_tables(arch: int) -> tuple[Table, ...]:
    """Every table of this package that serves `arch`, an architecture's or a device's."""
    return tuple(table for path in sorted(COMMITTED.glob("*.json")) if arch in (table := read(path)).arch)


def forget() -> None:
    """Have files and environment read again."""
    for cached in (tables, committed_tables, read):
        cached.cache_clear()


def _user_table(path: Path, device: str) -> Table | None:
    """The user's table; a file that is broken, newer or another device's is reported and left alone."""
    if not path.exists():
        if VARIABLE in os.environ and path.name != device_file(device):
            logger.warning("%s: expected a table of tiles or a directory of them, got %s", VARIABLE, path)
        return None
    try:
        table = read(path)
        if table.device != device:
            raise ValueError(f"{path}: device: expected {device!r}, which is what runs here, got {table.device!r}.")
    except (OSError, ValueError) as error:
        logger.warning("a table of tiles is ignored: %s", error)
        return None
    return table


@lru_cache(maxsize=64)
def read(path: Path) -> Table:
    """The table at `path`.

    Raises:
        ValueError: one sentence with file, field, what is expected and what came.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}.") from None
    return parse(content, path)


def parse(content: Any, path: Path) -> Table:
    """`content`, as read from `path`, checked field by field."""

    def expect(valid: bool, field: str, expected: str, got: Any) -> None:
        if not valid:
            raise ValueError(f"{path}: {field}: expected {expected}, got {got!r}.")

    def names(given: Any, field: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        expect(isinstance(given, dict), field, "an object", given)
        missing = [name for name in required if name not in given]
        expect(not missing, field, f"the fields {', '.join(required)}", sorted(given))
        unknown = sorted(set(given) - set(required) - set(optional))
        expect(not unknown, field, f"no other fields than {', '.join((*required, *optional))}", unknown)

    expect(isinstance(content, dict) and "version" in content, "version", f"{VERSION}", None)
    version = content["version"]
    expect(version == VERSION, "version", f"{VERSION}, the one that this omnigene-fast reads", version)
    source = content.get("source")
    expect(isinstance(source, str) and source in _PROVENANCE, "source", "predicted or measured", source)
    names(content, "table", ("version", "arch", "source", *_PROVENANCE[source], "buckets"), ("why", "shape"))
    arch = content["arch"]
    expect(
        isinstance(arch, list) and bool(arch) and all(_integer(a) for a in arch), "arch", "a list like [80, 86]", arch
    )
    expect(isinstance(content.get("device", ""), str), "device", "the GPU's name", content.get("device"))
    expect(isinstance(content["buckets"], list) and bool(content["buckets"]), "buckets", "a list", content["buckets"])

    def tile(given: Any, field: str) -> Tile:
        required = tuple(f.name for f in fields(Tile) if f.type is int)
        switches = tuple(f.name for f in fields(Tile) if f.type is bool)
        names(given, field, required, switches)
        for name, (low, high) in _POWERS.items():
            value = given[name]
            power = _integer(value) and value & (value - 1) == 0 and low <= value <= high
            expect(power, f"{field}.{name}", f"a power of two from {low} to {high}", value)
        stages = given["stages"]
        expect(_integer(stages) and 1 <= stages <= 8, f"{field}.stages", "an integer from 1 to 8", stages)
        for name in switches:
            expect(isinstance(given.get(name, True), bool), f"{field}.{name}", "true or false", given.get(name))
        return Tile(**given)

    def bucket(given: Any, field: str) -> Bucket:
        names(given, field, ("dtype", "rows_per_expert", "tiles"), (*_CHOICES, *_NOTES))
        dtype, rows = given["dtype"], given["rows_per_expert"]
        expect(dtype in ("half", "float32"), f"{field}.dtype", "half or float32", dtype)
        number = isinstance(rows, int | float) and not isinstance(rows, bool) and 0 < rows < math.inf
        expect(number, f"{field}.rows_per_expert", "a number above 0", rows)
        for name, allowed in _CHOICES.items():
            valid = name not in given or any(type(given[name]) is type(a) and given[name] == a for a in allowed)
            expect(valid, f"{field}.{name}", " or ".join(map(json.dumps, allowed)), given.get(name))
        names(given["tiles"], f"{field}.tiles", KERNELS)
        tiles = {name: tile(given["tiles"][name], f"{field}.tiles.{name}") for name in KERNELS}
        rows_of = {tiles[name].block_m for name in ("up", "down", "down_bwd", "low_rank")}
        expect(len(rows_of) == 1, f"{field}.tiles", "one block_m of up, down, down_bwd and low_rank", sorted(rows_of))
        note = {name: given[name] for name in _NOTES if name in given}
        choices = {name: given[name] for name in _CHOICES if name in given}
        return Bucket(dtype, rows, ExpertTiles(**tiles), **choices, note=note or None)

    buckets = tuple(bucket(given, f"buckets[{n}]") for n, given in enumerate(content["buckets"]))
    for kind in KINDS:
        centres = [bucket.rows_per_expert for bucket in buckets if bucket.serves(kind)]
        twice = sorted({centre for centre in centres if centres.count(centre) > 1})
        expect(not twice, "buckets", f"one bucket per rows_per_expert for {tuple(kind)}", twice)
    header = {name: value for name, value in content.items() if name != "buckets"}
    return Table(path, tuple(arch), source, content.get("device"), header, buckets)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def text(header: dict[str, Any], buckets: list[Bucket] | tuple[Bucket, ...]) -> str:
    """The file of a table: a line per tile."""
    lines = [f"  {json.dumps(name)}: {_lines(value)}," for name, value in header.items()]
    entries = []
    for bucket in buckets:
        given: dict[str, Any] = {"dtype": bucket.dtype}
        given |= {name: getattr(bucket, name) for name in _CHOICES if getattr(bucket, name) is not None}
        given |= {"rows_per_expert": bucket.rows_per_expert} | (bucket.note or {})
        head = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in given.items())
        tiles = (f'      "{name}": {json.dumps(vars(getattr(bucket.tiles, name)))}' for name in KERNELS)
        entries.append(f'    {{{head}, "tiles": {{\n' + ",\n".join(tiles) + "\n    }}")
    return "{\n" + "\n".join([*lines, '  "buckets": [', ",\n".join(entries), "  ]"]) + "\n}\n"


def _lines(value: Any) -> str:
    """A list of sentences takes a line for each."""
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return "[\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in value) + "\n  ]"
    return json.dumps(value)
