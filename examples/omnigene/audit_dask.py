"""Count the experts of a trace with Dask: the audit's counting over the same Parquet files, one line different.

A trace is a directory of part files, and counts of experts add up: each file is counted where there is time, and the
sums are those of one process. `Run.recount` takes any map over the files; Dask brings one.

    python examples/omnigene/audit_dask.py                              a small run, two workers on this machine
    python examples/omnigene/audit_dask.py out/audit/traces/accelerated/sft --workers 4
    python examples/omnigene/audit_dask.py RUN --scheduler tcp://head:8786        a cluster that sees RUN's directory
"""

import argparse
import importlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shared

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.demo.audit import trace_families
from omnigene_fast.demo.model import load_texts
from omnigene_fast.tracing.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Count here and there, compare."""
    options = arguments(argv)
    shared.need("dask.distributed", "'dask[distributed]'")
    shared.start(options)
    run = omnigene_fast.open_trace(options.run) if options.run else small_run(options)
    results = shared.Results(options, "Counting with Dask", (__doc__ or "").split("\n\n")[1])
    stored = run.counts  # those of the docs files
    begin = time.perf_counter()
    client = connect(options)
    try:
        ready = time.perf_counter()
        counts = run.recount()
        alone = time.perf_counter()
        there = run.recount(map=client.get_executor().map)  # the one line
        done = time.perf_counter()
        counted: dict[str, list[str]] = {}
        again = run.recount(map=noting(client, counted))
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
    finally:
        close(client)
    equal = check(run, stored, [counts, there, again], options)
    note = f"The workers took {ready - begin:.1f} s to start, which is not counted."
    seconds = {"this process": alone - ready, f"Dask, workers: {workers}": done - alone}
    rows = [{"counted by": name, "files": len(run.segments), "seconds": taken} for name, taken in seconds.items()]
    results.table(f"{run.counts.sum():,} picks of {len(run.gathered)} documents, counted", rows, note)
    tokens = {segment.part.name: segment.tokens for segment in run.segments}
    rows = [
        {"worker": name, "files": len(files), "tokens": sum(tokens[file] for file in files)}
        for name, files in sorted(counted.items())
    ]
    results.table("which worker counted what", rows, equal)
    results.save()


def connect(options: argparse.Namespace) -> Any:
    """A client of --scheduler, or of workers started here, with everything imported that counting needs."""
    from dask.distributed import Client, LocalCluster

    if options.scheduler:
        client = Client(options.scheduler, timeout=30)
    else:
        cluster = LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.ERROR,  # on a busy machine a worker that is to end is killed, with a warning
            local_directory=str(options.out / "dask"),
        )
        client = Client(cluster)
    client.run(importlib.import_module, "omnigene_fast.tracing.run")  # so that its time is not the counting's
    return client


def close(client: Any) -> None:
    """End the client, and the workers if they were started here."""
    cluster = client.cluster
    client.close()
    if cluster is not None:
        cluster.close()


def noting(client: Any, counted: dict[str, list[str]]) -> Callable[[Any, Iterable[Any]], list[Any]]:
    """A map that also notes which worker has which file's result, name -> part files."""

    def spread(function: Any, segments: Iterable[Any]) -> list[Any]:
        segments = list(segments)
        futures = client.map(function, segments, pure=False)
        results = client.gather(futures)
        where = client.who_has(futures)
        for future, segment in zip(futures, segments, strict=True):
            counted.setdefault(where[future.key][0], []).append(segment.part.name)
        return list(results)

    return spread


def check(run: Run, counts: Any, others: Sequence[Any], options: argparse.Namespace) -> str:
    """What was found equal; RuntimeError unless all counts, and the divergence that follows from them, are."""
    for other in others:
        if not np.array_equal(counts, other):
            raise RuntimeError(f"{run.path}: expected equal counts, got other ones; `omnigene-fast verify` says more.")
    by = options.by or "task"
    if by not in run.labels:
        if options.by:
            raise ValueError(f"--by: expected a label of the run ({', '.join(run.labels) or 'none'}), got {by}.")
        return "Equal: all counts."
    expected = analysis.divergence(run, by, permutations=20)
    again = omnigene_fast.open_trace(run.path)
    again.counts = others[0]  # where the measures find them
    if not analysis.divergence(again, by, permutations=20).equals(expected):
        raise RuntimeError(f"{run.path}: expected an equal divergence from equal counts.")
    return f"Equal: all counts, and the divergence by {by} from them."


def small_run(options: argparse.Namespace) -> Run:
    """A run of the 12 families through the small model, in OUT/run, of several part files."""
    path = options.out / "run"
    shutil.rmtree(path, ignore_errors=True)
    model = shared.switch(shared.load(options)[0], shared.ways(options)[-1])
    texts = {family: each[-options.texts :] for family, each in load_texts(50).items()}
    return trace_families(model, path, texts, 128, "small model", segment_tokens=2048)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = shared.parser(__doc__ or "", "audit_dask")
    add = parser.add_argument
    add("run", type=Path, nargs="?", metavar="RUN", help="directory of a trace; a small one is made by default")
    add("--workers", type=shared.positive, default=2, help="processes to start (default: 2)")
    add("--scheduler", help="address of a running scheduler, instead of starting workers")
    add("--by", help="label of the groups whose divergence is compared (default: task, where there is one)")
    add("--texts", type=shared.positive, default=16, help="of each family in the small run (default: 16)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    shared.script("audit_dask", main)
