"""Damaged files of a run: what was committed stays, and every flipped bit is found or changes nothing."""

import errno
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from omnigene_fast.tracing import layout
from omnigene_fast.tracing.layout import write_file
from omnigene_fast.tracing.records import Records
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

META = {"layers": [0, 2, 5], "num_experts": 16, "top_k": 4, "model": "some"}


def _write(path: Path, segments: int = 3) -> None:
    rng = np.random.default_rng(0)
    with Writer(path, META, segment_tokens=20) as writer:
        for doc in range(segments):
            ids = np.argsort(rng.random((3, 20, 16)), axis=2)[..., :4].astype(np.uint8)
            pos, zero = np.arange(20, dtype=np.int32), np.zeros(20, np.uint8)
            writer.add(Records(np.full(20, doc, np.int64), pos, pos, zero, ids), {doc: {"task": f"t{doc}"}})


def _content(path: Path) -> tuple:
    run = open_trace(path)
    labels = {name: np.asarray(values).tolist() for name, values in run.gathered.labels.items()}
    batches = [(b.doc.tolist(), b.pos.tolist(), b.token.tolist(), b.ids.tolist()) for b in run.batches(kinds=("ids",))]
    return run.meta, run.dropped, run.segments, batches, run.gathered.n_tokens.tolist(), labels


@pytest.mark.parametrize("bit", range(8))
def test_a_damaged_last_newline_loses_no_segment(tmp_path, bit):
    _write(tmp_path / "run")
    file, before = tmp_path / "run" / "manifest.jsonl", _content(tmp_path / "run")
    text = bytearray(file.read_bytes())
    text[-1] ^= 1 << bit
    file.write_bytes(text)
    assert _content(tmp_path / "run") == before
    assert any("lost its newline" in fault for fault in open_trace(tmp_path / "run").verify())
    Writer(tmp_path / "run", META).close()
    assert _content(tmp_path / "run") == before
    assert open_trace(tmp_path / "run").verify() == []


def test_a_line_damaged_besides_its_newline_is_refused(tmp_path):
    _write(tmp_path / "run")
    file = tmp_path / "run" / "manifest.jsonl"
    text = file.read_bytes()
    file.write_bytes(text[:-1].replace(b'"tokens": 20', b'"tokens": 21') + b"*")
    names = sorted(entry.name for entry in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=r"line 1: expected checksum"):
        Writer(tmp_path / "run", META)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == names


def test_runs_without_checksums_stay_readable(tmp_path):
    _write(tmp_path / "run")
    before = _content(tmp_path / "run")
    for name in ("meta.json", "manifest.jsonl"):
        file = tmp_path / "run" / name
        lines = [file.read_text()] if name == "meta.json" else file.read_text().splitlines()
        entries = [{k: v for k, v in json.loads(line).items() if k != layout.CHECKSUM} for line in lines]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert _content(tmp_path / "run") == before
    assert open_trace(tmp_path / "run").verify() == []
    Writer(tmp_path / "run", META).close()


def test_200_flipped_bits_are_found_or_change_nothing(tmp_path):
    _write(tmp_path / "run")
    path, rng, found = tmp_path / "run", np.random.default_rng(1), 0
    before = _content(path)
    files = sorted(entry for entry in path.iterdir() if entry.stat().st_size)
    for step in range(200):
        file = files[step % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                faults = open_trace(path).verify()
            except ValueError as error:
                faults = [str(error)]
            found += bool(faults)
            if not faults:
                meta, *rest = _content(path)
                assert {key: meta[key] for key in before[0]} == before[0], (step, file.name)
                assert rest == list(before[1:]), (step, file.name)
        assert {entry.name for entry in files} <= {entry.name for entry in path.iterdir()}, (step, file.name)
        file.write_bytes(good)
    assert found > 150


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*part-0-000000\.parquet'"):
        write_file(tmp_path, "part-0-000000.parquet", b"some")
