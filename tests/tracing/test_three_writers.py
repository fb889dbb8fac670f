"""`kill -9` at random moments of three writers that write one run side by side.

OMNIGENE_FAST_KILLS says how many kills there are: 25 are a campaign, some belong to every run of the tests.
"""

import os
import signal
import time

import numpy as np

from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import DOCS_PER_RANK, Writer

from . import children
from .synthetic import everything, meta, records, same

KILLS = int(os.environ.get("OMNIGENE_FAST_KILLS", "9"))
WRITERS = 3
SEGMENT = 12  # tokens
DOCUMENT = 6  # tokens, in two calls
SHAPE = {"layers": range(3), "num_experts": 16, "top_k": 4}


def write_on(path, rank: int, told) -> None:
    """Add documents, without an end, to the last one that was begun; tell each commit's tokens through the pipe."""
    number = told.fileno()
    with Writer(path, meta(**SHAPE), record=("ids", "weights"), rank=rank, segment_tokens=SEGMENT) as writer:
        os.write(number, b"0")
        first = rank * DOCS_PER_RANK
        done = {doc: n for doc, n in writer.documents().items() if first <= doc < first + DOCS_PER_RANK}
        doc = max(done, default=first)
        while True:
            for start in range(done.get(doc, 0), DOCUMENT, 2):
                stop = min(start + 2, DOCUMENT)
                writer.add(records([doc] * (stop - start), range(start, stop)), {doc: {"task": f"t{doc % 3}"}})
                os.write(number, bytes([stop - start]))
            doc += 1


def told_by(pipe) -> int:
    """Tokens that the calls of a killed writer brought before it ended."""
    tokens = 0
    while chunk := os.read(pipe.fileno(), 4096):
        tokens += sum(chunk.replace(b"0", b""))
    pipe.close()
    return tokens


def committed(path) -> dict[int, int]:
    """Tokens in the manifest, by rank; the run opens, and has no fault but what a killed writer had under way."""
    run = open_trace(path)
    faults = run.verify()
    assert all("not in the manifest" in fault or "torn" in fault for fault in faults), faults
    tokens = dict.fromkeys(range(WRITERS), 0)
    for segment in run.segments:
        tokens[segment.rank] += segment.tokens
    return tokens


def assert_whole(path) -> int:
    """Every document is what its writer was to write, up to where it is committed; all tokens."""
    found = everything(open_trace(path))
    for doc, (row, kept) in found.items():
        n = len(kept)
        assert kept.pos.tolist() == list(range(n)), f"document {doc}"
        assert same(kept, records([doc] * n, range(n)), ("ids", "weights")), f"document {doc}"
        assert row["task"] == f"t{doc % 3}"
    return sum(len(kept) for _, kept in found.values())


def test_kills_of_three_writers_at_random_moments(tmp_path):
    rng, path = np.random.default_rng(7), tmp_path / "run"
    before, at_once, seen = dict.fromkeys(range(WRITERS), 0), 0, set()
    kills = 0
    while kills < KILLS:
        pipes, writers = {}, {}
        for rank in range(WRITERS):
            pipes[rank], told = children.pipe()
            writers[rank] = children.start(write_on, path, rank, told)
            told.close()
        for pipe in pipes.values():
            assert os.read(pipe.fileno(), 1) == b"0", "a writer could not go on"
        victims = rng.permutation(WRITERS)[: rng.integers(1, WRITERS + 1)].tolist()
        for rank in victims:
            time.sleep(rng.uniform(0, 0.15))
            writers[rank].kill()
            assert children.exit_code(writers[rank]) == -signal.SIGKILL
        at_once += len(victims) > 1
        kills += WRITERS
        if len(victims) < WRITERS:  # the others write on beside what the killed ones left
            committed(path)
            time.sleep(rng.uniform(0, 0.05))
        for rank in set(writers) - set(victims):
            assert writers[rank].is_alive(), "a kill ended another writer"
            writers[rank].kill()
            assert children.exit_code(writers[rank]) == -signal.SIGKILL
        now = committed(path)
        for rank, pipe in pipes.items():
            brought = told_by(pipe)
            assert now[rank] >= before[rank] + brought - SEGMENT, f"kill {kills}: writer {rank} lost a segment"
        assert_whole(path)
        seen.add(tuple(now[rank] - before[rank] for rank in now))
        before = now
    for rank in range(WRITERS):  # each goes on, and removes what its killed self left
        with Writer(path, meta(**SHAPE), record=("ids", "weights"), rank=rank) as writer:
            assert sum(n for doc, n in writer.documents().items() if doc // DOCS_PER_RANK == rank) == before[rank]
    run = open_trace(path)
    assert run.verify() == []
    assert assert_whole(path) == sum(before.values())
    assert len(seen) > KILLS / WRITERS / 2, "the kills fell at different moments"
    print(
        f"{kills} kills of {WRITERS} writers, {at_once} times of several at once: {len(run.segments)} segments,"
        f" {sum(before.values())} tokens, none lost"
    )
