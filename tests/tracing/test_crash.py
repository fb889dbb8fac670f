"""`kill -9` while a run is written, at random moments and before every step that reaches the disk.

A child writes, and tells through a pipe each call of the writer that returned; then it is killed.
"""

import os
import signal
import time

import numpy as np
import pytest

from omnigene_fast.tracing.layout import TEMPORARY
from omnigene_fast.tracing.manifest import MANIFEST, data_name, read_manifest, uncommitted
from omnigene_fast.tracing.run import Run, open_trace
from omnigene_fast.tracing.store import Writer

from . import children
from .synthetic import assert_equal_runs, meta, records

KILLS = 50
DOCUMENTS = 24
SEGMENT = 12  # tokens: two or three calls
SHAPE = {"layers": range(3), "num_experts": 16, "top_k": 4}


def calls():
    """What the writer is given: two documents decoded side by side, each of them over three calls."""
    for doc in range(0, DOCUMENTS, 2):
        for start in range(0, 6, 2):
            yield records([doc, doc + 1] * 2, [start, start, start + 1, start + 1]), {doc: {"task": f"t{doc % 3}"}}


CALLS = list(calls())


def write(path, told=None) -> None:
    """Write the run, or the rest of it: rows that an earlier writer committed are left out."""
    writer = Writer(path, meta(**SHAPE), record=("ids", "weights"), segment_tokens=SEGMENT)
    done = writer.documents()
    for given, labels in CALLS:
        missing = given.take(given.pos >= [done.get(doc, 0) for doc in given.doc.tolist()])
        if len(missing):
            writer.add(missing, labels)
        if told is not None:
            told()
    writer.close()


def child(path, told, step: int | None) -> None:
    """Write, and die at the given step if there is one."""
    tell, number = os.write, told.fileno()  # not the `write` that `die_at` replaces
    tell(number, b"0")
    if step is not None:
        die_at(step)
    write(path, lambda: tell(number, b"x"))


def killed(path, *, after: float | None = None, step: int | None = None) -> tuple[bool, int, float]:
    """Let a child write until it is killed, `after` seconds or at a step, or done; whether it was, the calls that
    returned, and the seconds that it lived."""
    returned, told = children.pipe()
    writer = children.start(child, path, told, step)
    told.close()
    assert os.read(returned.fileno(), 1) == b"0"
    begin = time.perf_counter()
    if after is not None:
        time.sleep(after)
        writer.kill()
    code = children.exit_code(writer)
    lived = time.perf_counter() - begin
    assert code in (0, -signal.SIGKILL)
    calls = 0
    while chunk := os.read(returned.fileno(), 4096):
        calls += len(chunk)
    returned.close()
    return code == 0, calls, lived


def assert_sound(path, returned: int) -> int:
    """Everything in the manifest reads back whole, and no more than the open segment is lost; tokens committed."""
    if not (path / "meta.json").exists():
        assert returned == 0
        return 0
    run = open_trace(path)
    faults = run.verify()
    assert all("not in the manifest" in fault or "torn" in fault for fault in faults), faults
    tokens = sum(segment.tokens for segment in run.segments)
    given = sum(len(records) for records, _ in CALLS[:returned])
    # The open segment holds less than SEGMENT tokens, or the calls that filled it would not have returned.
    assert tokens > given - SEGMENT
    return tokens


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("whole") / "run"
    write(path)
    run = open_trace(path)
    assert sum(segment.tokens for segment in run.segments) == 6 * DOCUMENTS
    assert len(run.segments) == 12
    return run


def test_fifty_kills_at_random_moments(tmp_path, uninterrupted):
    rng = np.random.default_rng(0)
    path = tmp_path / "0"
    ended, returned, duration = killed(tmp_path / "timed")
    assert (ended, returned) == (True, len(CALLS))
    kills = runs = committed = 0
    seen = set()
    while kills < KILLS:
        ended, returned, _ = killed(path, after=rng.uniform(0, duration / 2))
        kills += not ended
        tokens = assert_sound(path, returned)
        assert tokens >= committed, "what was committed before is still there"
        seen.add(tokens)
        committed = tokens
        if ended:
            assert_equal_runs(open_trace(path), uninterrupted)
            runs, committed = runs + 1, 0
            path = tmp_path / str(runs)
    write(path)
    assert_equal_runs(open_trace(path), uninterrupted)
    assert open_trace(path).verify() == []
    assert len(seen) > 5, "the kills fell at different moments"


def die_at(step: int) -> None:
    """In a child: the `step`-th call that reaches the disk is its last; of a write half is done, of others nothing."""
    count = 0

    def counted(name, call):
        def instead(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for name in ("mkdir", "replace", "unlink", "fsync", "write", "ftruncate"):
        setattr(os, name, counted(name, getattr(os, name)))


def test_a_kill_at_every_step_of_the_first_commits(tmp_path, uninterrupted):
    """One child for each step, from the directory to the fourth segment: the first of a run, and one that follows."""
    torn = unlisted = step = tokens = 0
    while tokens < 3 * SEGMENT:
        step += 1
        path = tmp_path / str(step)
        ended, returned, _ = killed(path, step=step)
        assert not ended
        tokens = assert_sound(path, returned)
        manifest = path / MANIFEST
        torn += manifest.exists() and not manifest.read_bytes().endswith(b"\n") and manifest.stat().st_size > 0
        unlisted += path.exists() and bool(uncommitted(path, read_manifest(path)))
        write(path)
        assert_equal_runs(open_trace(path), uninterrupted)
        assert open_trace(path).verify() == []
        assert not list(path.glob(f"*{TEMPORARY}"))
    assert step > 25
    assert torn == 3
    assert unlisted > 15


def test_a_kill_while_a_killed_run_is_reopened(tmp_path, uninterrupted):
    """Removing what a crash left behind can be cut short as well."""
    for step in range(1, 7):
        path = tmp_path / str(step)
        write(path)
        for name in (data_name("part", 0, 12), data_name("docs", 0, 12), "part-0-000013.parquet.new"):
            (path / name).write_bytes(b"half")
        (path / "part-1-000000.parquet").write_bytes(b"of another rank")
        with open(path / MANIFEST, "a") as file:
            file.write('{"format":')
        ended, *_ = killed(path, step=step)
        assert ended == (step == 6)  # the directory, a cut line, three removed files
        assert (path / "part-1-000000.parquet").exists()
        (path / "part-1-000000.parquet").unlink()
        write(path)
        assert open_trace(path).verify() == []
        assert_equal_runs(open_trace(path), uninterrupted)
