"""Tile tables and the choice among them. Nothing is launched: no GPU, no interpreter."""

import json
import logging
import math
import timeit
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from omnigene_fast import backends
from omnigene_fast.backends import triton as backend
from omnigene_fast.kernels import tables, tiles

ARCHES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
TABLED = (80, 86, 87, 89, 90, 100, 103)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = "NVIDIA H100 80GB HBM3"
FILE = "nvidia_h100_80gb_hbm3.json"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No table of whoever runs the tests; files are read anew in each test."""
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tables.forget()
    tiles.expert_tiles.cache_clear()
    yield
    tables.forget()
    tiles.expert_tiles.cache_clear()


def committed(name="sm_90.json"):
    return json.loads((tables.COMMITTED / name).read_text())


def measured(**changes):
    """A measured table of `DEVICE` with one bucket, which has tiles that nothing else has."""
    bucket = next(b for b in committed()["buckets"] if b["dtype"] == "half" and b.get("aligned"))
    bucket |= {
        "rows_per_expert": 32,
        "tiles": {n: t | {"block_k": 32, "stages": 2} for n, t in bucket["tiles"].items()},
    }
    provenance = {
        "device": DEVICE,
        "date": "2026-01-01",
        "versions": {"torch": "2.11"},
        "command": "omnigene-fast tune",
    }
    table = {"version": 1, "arch": [90], "source": "measured", **provenance, "buckets": [bucket]}
    return table | changes


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tables.forget()
    tiles.expert_tiles.cache_clear()
    return path


def choose(rows=32, arch=90, device=DEVICE, dtype=torch.bfloat16, **options):
    return tiles.expert_tiles(rows, 704, dtype, arch, device=device, **options)


# The committed tables


def test_committed_tables_are_as_they_would_be_written():
    for path in tables.COMMITTED.glob("*.json"):
        table = tables.read(path)
        assert path.read_text() == tables.text(table.header, table.buckets)


@pytest.mark.parametrize("name", ["sm_80.json", "sm_90.json", "sm_100.json"])
def test_an_architecture_s_table_serves_everything_and_says_that_it_is_predicted(name):
    table = tables.read(tables.COMMITTED / name)
    assert f"sm_{table.arch[0]}.json" == name
    assert table.source == "predicted"
    assert "Nothing here is measured" in table.header["why"][0]
    assert all(table.nearest(kind, 1) for kind in tables.KINDS)


def test_a_committed_measurement_says_where_when_and_how():
    for path in tables.COMMITTED.glob("*.json"):
        table = tables.read(path)
        assert (table.source == "measured") == (table.device is not None)
        if table.device is not None:
            assert path.name == tables.device_file(table.device)


def test_the_default_asks_for_nothing_that_later_architectures_lack():
    for bucket in tables.read(tables.COMMITTED / "sm_80.json").buckets:
        assert not any(tile.tma for tile in vars(bucket.tiles).values())


# The choice


def test_every_choice_is_listed_and_fits():
    for arch, bits in product(ARCHES, (16, 8)):
        listed = tiles.all_configs(arch, weight_bits=bits)
        for dtype, rows, intermediate in product(DTYPES, (0, 1, 16, 17, 33, 64, 100, 129, 10**6), (1, 64, 704, 768)):
            alike = torch.bfloat16 if dtype == torch.float16 else dtype
            for aligned, lora in product((True, False), repeat=2):
                choice = tiles.expert_tiles(
                    rows, intermediate, dtype, arch, aligned=aligned, lora=lora, weight_bits=bits
                )
                assert (alike, aligned, lora, choice) in listed
        for dtype, _, _, choice in listed:
            for name, tile in vars(choice).items():
                size = 1 if bits == 8 and name in ("up", "down", "down_bwd") else dtype.itemsize
                columns = (2 if name == "up" else 1) * tile.block_n
                stage = (tile.block_m * dtype.itemsize + columns * size) * tile.block_k
                converted = columns * tile.block_k * dtype.itemsize if size < dtype.itemsize else 0
                assert tile.stages >= 2
                barriers = 96 if tile.tma else 0  # as compiled for sm_100
                assert tile.stages * stage + converted + barriers <= tiles.shared_limit(arch)
                assert not (tile.chain and arch >= 100)


@pytest.mark.parametrize("arch", ARCHES)
def test_an_expert_s_rows_mostly_fit_one_tile(arch):
    """The next power of two up to 128; where operands are unaligned or float32, two sizes."""
    for rows in range(1, 400):
        power = min(max(16, 1 << (rows - 1).bit_length()), 128)
        assert choose(rows, arch, None).block_m == power
        assert choose(rows, arch, None, aligned=False).block_m == (16 if rows <= 32 else 64)
        assert choose(rows, arch, None, dtype=torch.float32).block_m == (16 if rows <= 32 else 64)


def test_the_nearest_bucket_answers_by_the_logarithm():
    one = measured()["buckets"][0]
    buckets = [one | {"rows_per_expert": rows} for rows in (4, 64)]
    buckets[1] = one | {"rows_per_expert": 64, "tiles": {n: t | {"stages": 3} for n, t in one["tiles"].items()}}
    table = tables.parse(measured(buckets=buckets), tables.COMMITTED / "x.json")
    kind = tables.Kind("half", True, False, "same")
    answers = [table.nearest(kind, rows).rows_per_expert for rows in (0, 1, 4, 15, 17, 64, 10**6)]
    assert answers == [4, 4, 4, 4, 64, 64, 64]  # 16 is their geometric middle, 34 the other one
    assert table.nearest(kind._replace(dtype="float32"), 4) is None


def test_the_choice_is_constant_inside_a_bucket_whatever_came_before():
    """Known trap: tiles chosen for the first T are kept for every other."""
    first = [choose(rows, device=None) for rows in (9, 12, 16)]
    assert first == [first[0]] * 3
    assert choose(17, device=None) != first[0]
    assert choose(9, device=None) == first[0]


def test_columns_of_a_wide_tile_are_not_mostly_padding():
    wide, narrow = (tiles.expert_tiles(200, i, torch.bfloat16, 90) for i in (704, 192))
    assert (wide.up.block_n, wide.down_bwd.block_n) == (128, 128)
    assert (narrow.up.block_n, narrow.down_bwd.block_n) == (64, 64)
    assert narrow.down.block_n == wide.down.block_n  # its columns are H's


def test_eight_bits_leave_room_for_more_stages():
    """16 rows and 256 columns, 128 deep: 69,632 bytes a stage, or 36,864 and once 65,536 for what is converted."""
    table = tables.read(tables.COMMITTED / "sm_90.json")
    bucket = table.nearest(tables.Kind("half", True, False, "same"), 12)
    wide = replace(bucket, tiles=replace(bucket.tiles, down=replace(bucket.tiles.down, block_n=256)), weights=None)
    fitted = {
        name: tiles._fitted(wide, table, 704, torch.bfloat16, 90, tables.Kind("half", True, False, name))
        for name in ("same", "8bit")
    }
    assert {name: choice.down.stages for name, choice in fitted.items()} == {"same": 3, "8bit": 4}
    assert fitted["same"].gram == fitted["8bit"].gram  # its operands are activations


def test_a_lookup_costs_microseconds():
    """Decode asks once per layer and token. An answer that was given before is a dictionary's."""
    choose(1)
    again = min(timeit.repeat(lambda: choose(1), number=1000, repeat=5)) / 1000
    assert again < 20e-6


def test_the_backend_asks_for_its_gpu_and_its_weights(monkeypatch, tmp_path):
    """A table measured on the GPU reaches the launchers, and weights in 8 bits have buckets of their own."""
    path = tmp_path / "cache" / "omnigene-fast" / "tuned" / FILE
    bits = measured()["buckets"][0] | {"weights": "8bit"}
    save(measured(buckets=[bits]), path)
    monkeypatch.setattr(tiles, "gpu_name", lambda device: DEVICE)
    monkeypatch.setattr(backend, "_arch", lambda device: 90)
    index, hidden = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 32, dtype=torch.bfloat16)
    shapes = ((2, 32, 32), (2, 32, 16))
    plain, low = ([torch.zeros(s, dtype=dtype) for s in shapes] for dtype in (torch.bfloat16, torch.int8))
    lora = backends.Lora(None, None, None, None)
    assert backend._tiles(index, lora, hidden, *low).down.block_k == 32
    assert backend._tiles(index, lora, hidden, *plain).down.block_k == 128


def test_a_measured_bucket_of_8_bits_is_launched_as_it_is(monkeypatch, tmp_path):
    """What was measured is what runs; e4m3 as bits, the control, has half the step."""
    bucket = measured()["buckets"][0] | {"weights": "8bit"}
    bucket["tiles"] = {
        n: t | {"block_m": 64, "block_n": 128, "block_k": 64, "stages": 2} for n, t in bucket["tiles"].items()
    }
    path = save(measured(buckets=[bucket]), tmp_path / "cache" / "omnigene-fast" / "tuned" / FILE)
    monkeypatch.setattr(tiles, "gpu_name", lambda device: DEVICE)
    monkeypatch.setattr(backend, "_arch", lambda device: 90)
    index, hidden = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 32, dtype=torch.bfloat16)
    lora = backends.Lora(None, None, None, None)
    tuned = tables.read(path).buckets[0].tiles
    for dtype, step in ((torch.int8, 64), (torch.float8_e4m3fn, 64), (torch.uint8, 32)):
        weights = (torch.zeros(shape, dtype=dtype) for shape in ((2, 256, 32), (2, 32, 128)))
        launched = backend._tiles(index, lora, hidden, *weights)
        assert launched == replace(tuned, up=replace(tuned.up, block_k=step))


# Tables of the user


def test_a_user_s_table_of_this_device_comes_first(tmp_path):
    expected = choose()
    path = save(measured(), tmp_path / "cache" / "omnigene-fast" / "tuned" / FILE)
    assert tables.user_file(DEVICE) == path
    assert choose().up.block_k == 32
    assert choose(10**6).up.block_k == 32
    assert choose(device="NVIDIA H200") == choose(device=None) == expected
    assert choose(dtype=torch.float32) == choose(dtype=torch.float32, device=None)  # no bucket of it: the next table's


@pytest.mark.parametrize("folder", [True, False])
def test_a_variable_names_another_place(monkeypatch, tmp_path, folder):
    path = save(measured(), tmp_path / "elsewhere" / FILE)
    monkeypatch.setenv(tables.VARIABLE, str(path.parent if folder else path))
    tables.forget()
    assert choose().up.block_k == 32
    monkeypatch.setenv(tables.VARIABLE, "")
    tables.forget()
    tiles.expert_tiles.cache_clear()
    assert choose() == choose(device=None)


def test_a_directory_that_is_yet_to_be_made_ends_with_a_slash(monkeypatch, tmp_path):
    monkeypatch.setenv(tables.VARIABLE, f"{tmp_path / 'new'}/")
    assert tables.user_file(DEVICE) == tmp_path / "new" / FILE
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "new"))
    assert tables.user_file(DEVICE) == tmp_path / "new"


def test_a_variable_that_names_nothing_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "none.json"))
    for rows in (1, 2):
        assert choose(rows) == choose(rows, device=None)
    assert sum("OMNIGENE_FAST_TUNED: expected a table" in m for m in caplog.messages) == 1


def test_a_committed_measurement_comes_before_the_architecture_s_table(monkeypatch, tmp_path, caplog):
    for path in tables.COMMITTED.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(tables, "COMMITTED", tmp_path)
    save(measured(), tmp_path / FILE)
    with caplog.at_level(logging.INFO, logger="omnigene_fast"):
        assert choose().up.block_k == 32
    assert not caplog.messages
    listed = tiles.all_configs(90)
    assert (torch.bfloat16, True, False, choose()) in listed
    assert (torch.bfloat16, True, False, choose(device=None)) in listed


BROKEN = {
    "no JSON": ("{", "expected JSON, got Expecting property name"),
    "a list": ([], "version: expected 1, got None."),
    "newer": (measured(version=2), "version: expected 1, the one that this omnigene-fast reads, got 2."),
    "another GPU's": (measured(device="NVIDIA H200"), "device: expected 'NVIDIA H100 80GB HBM3', which is what runs"),
    "no source": (measured(source="guessed"), "source: expected predicted or measured, got 'guessed'."),
    "sources": (measured(source=["measured"]), "source: expected predicted or measured, got ['measured']."),
    "no date": ({k: v for k, v in measured().items() if k != "date"}, "table: expected the fields version, arch, sou"),
    "no buckets": (measured(buckets=[]), "buckets: expected a list, got []."),
    "arch": (measured(arch=90), "arch: expected a list like [80, 86], got 90."),
}
_BUCKET = measured()["buckets"][0]
_TILES = _BUCKET["tiles"]
BROKEN_BUCKETS = {
    "dtype": (_BUCKET | {"dtype": "bf16"}, "buckets[0].dtype: expected half or float32, got 'bf16'."),
    "aligned": (_BUCKET | {"aligned": 1}, "buckets[0].aligned: expected true or false, got 1."),
    "weights": (_BUCKET | {"weights": "4bit"}, 'buckets[0].weights: expected "same" or "8bit", got \'4bit\'.'),
    "rows": (_BUCKET | {"rows_per_expert": 0}, "buckets[0].rows_per_expert: expected a number above 0, got 0."),
    "nan": (_BUCKET | {"rows_per_expert": math.nan}, "buckets[0].rows_per_expert: expected a number above 0, got nan."),
    "missing": (_BUCKET | {"tiles": {"up": _TILES["up"]}}, "buckets[0].tiles: expected the fields up, down, down_bwd"),
    "unknown": (_BUCKET | {"fast": True}, "buckets[0]: expected no other fields than dtype, rows_per_expert, tiles"),
    "power": (
        _BUCKET | {"tiles": _TILES | {"up": _TILES["up"] | {"block_n": 96}}},
        "buckets[0].tiles.up.block_n: expected a power of two from 16 to 256, got 96.",
    ),
    "stages": (
        _BUCKET | {"tiles": _TILES | {"gram": _TILES["gram"] | {"stages": 0}}},
        "buckets[0].tiles.gram.stages: expected an integer from 1 to 8, got 0.",
    ),
    "switch": (
        _BUCKET | {"tiles": _TILES | {"down": _TILES["down"] | {"tma": "yes"}}},
        "buckets[0].tiles.down.tma: expected true or false, got 'yes'.",
    ),
    "block_m": (
        _BUCKET | {"tiles": _TILES | {"down": _TILES["down"] | {"block_m": 64}}},
        "buckets[0].tiles: expected one block_m of up, down, down_bwd and low_rank, got [16, 64].",
    ),
}
BROKEN |= {name: (measured(buckets=[bucket]), message) for name, (bucket, message) in BROKEN_BUCKETS.items()}
BROKEN["twice"] = (measured(buckets=[_BUCKET, _BUCKET]), "buckets: expected one bucket per rows_per_expert for ('half'")


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_of_the_user_is_said_once_and_ignored(tmp_path, caplog, content, message):
    path = save(content, tmp_path / "cache" / "omnigene-fast" / "tuned" / FILE)
    for rows in (1, 2, 500):
        assert choose(rows) == choose(rows, device=None)
    said = [text for text in caplog.messages if "ignored" in text]
    assert len(said) == 1, caplog.messages
    assert f"{path}: {message}" in said[0]
    assert len(said[0].splitlines()) == 1


# The log


def test_the_log_says_once_what_was_not_measured(caplog):
    caplog.set_level(logging.INFO, logger="omnigene_fast")
    for rows in (1, 2):
        choose(rows, device=None)
    assert not caplog.messages
    for rows in (1, 2):
        choose(rows)
        choose(rows, 120, "NVIDIA GeForce RTX 5090")
    predicted, default = caplog.records
    assert predicted.levelno == logging.INFO
    assert f"on {DEVICE} (sm_90): taking those predicted for it (sm_90.json); `omnigene-fast tune`" in caplog.text
    assert default.levelno == logging.WARNING
    assert "on NVIDIA GeForce RTX 5090 (sm_120): taking those of sm_80, the most conservative;" in caplog.text


def test_a_measured_table_needs_no_word(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="omnigene_fast")
    save(measured(), tmp_path / "cache" / "omnigene-fast" / "tuned" / FILE)
    choose()
    assert not caplog.messages
