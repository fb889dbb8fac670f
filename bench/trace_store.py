"""How fast a trace is written and counted: synthetic, skewed routing, made outside of the measured time.

    python bench/trace_store.py --tokens 10000000 --layers 30 --out DIR      DIR must not exist; it is deleted

Goals on 2 cores for 10 million tokens x 30 layers: written at 100 MB of raw ids a second or more, counted from the
tokens in 15 s or less and 1 GB of memory or less.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from omnigene_fast.tracing.records import Records
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

CHUNK = 16384  # tokens of a call of the writer
POOL = 65536  # different tokens, drawn from in another order for each chunk
DOCUMENT = 512  # tokens
_PROCESS = Path("/proc/self")


def main() -> None:
    """Write, count, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--record", default="ids", help="kinds, separated by commas: ids,weights,stats")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: expected a path that does not exist, got {args.out}")
    record = tuple(args.record.split(","))
    pool = make_pool(args.layers, args.experts, args.top_k)
    meta = {"layers": list(range(args.layers)), "num_experts": args.experts, "top_k": args.top_k, "model": "synthetic"}
    raw = args.tokens * args.layers * args.top_k * pool.itemsize
    try:
        reset_peak()
        seconds = write(args.out, meta, record, pool, args.tokens)
        size = sum(file.stat().st_size for file in args.out.iterdir())
        print(f"written   {seconds:7.2f} s   {raw / 1e6 / seconds:7.0f} MB of raw ids/s   peak RSS {peak_mb():.0f} MB")
        print(f"size      {size / 1e6:7.0f} MB, {size / raw:.3f} of the raw ids")
        run = open_trace(args.out)
        del pool
        reset_peak()
        begin = time.perf_counter()
        found = run.histogram(progress=True)
        seconds = time.perf_counter() - begin
        print(f"counted   {seconds:7.2f} s   {raw / 1e6 / seconds:7.0f} MB of raw ids/s   peak RSS {peak_mb():.0f} MB")
        if not (found.sum(1) == args.tokens * args.top_k).all() or not (found == run.counts.sum(0)).all():
            raise SystemExit("the picks that were counted are not those that were written")
    finally:
        shutil.rmtree(args.out, ignore_errors=True)


def make_pool(layers: int, experts: int, top_k: int) -> NDArray[np.uint8 | np.uint16]:
    """[L, POOL, K] ids whose experts differ in popularity, by the Gumbel trick: top-K of noise and a bias per layer."""
    rng = np.random.default_rng(0)
    pool = np.empty((layers, POOL, top_k), np.uint8 if experts <= 254 else np.uint16)
    for layer in tqdm(pool, "making", unit="layer"):
        bias = rng.normal(0, 1.2, experts).astype(np.float32)
        noise = np.maximum(rng.standard_exponential((POOL, experts), np.float32), 1e-30)
        scores = np.log(noise) - bias
        layer[:] = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k]
    return pool


def write(
    path: Path, meta: dict[str, object], record: tuple[str, ...], pool: NDArray[np.uint8 | np.uint16], tokens: int
) -> float:
    """Seconds in the writer alone, with everything durable at the end."""
    rng = np.random.default_rng(1)
    layers, _, top_k = pool.shape
    weights = rng.random((layers, CHUNK, top_k), np.float32).astype(np.float16)
    stats = rng.random((layers, CHUNK, 3), np.float32).astype(np.float16)
    begin = time.perf_counter()
    writer = Writer(path, meta, record=record)
    spent = time.perf_counter() - begin
    for start in tqdm(range(0, tokens, CHUNK), "writing", unit="call"):
        n = min(CHUNK, tokens - start)
        number = np.arange(start, start + n)
        ids = pool[:, rng.integers(0, POOL, n)]
        flat = (
            number // DOCUMENT,
            (number % DOCUMENT).astype(np.int32),
            number.astype(np.int32),
            np.zeros(n, np.uint8),
        )
        records = Records(*flat, ids, weights[:, :n], stats[:, :n])
        begin = time.perf_counter()
        writer.add(records)
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    writer.close()
    return spent + time.perf_counter() - begin


def reset_peak() -> None:
    """Forget the peak of the resident memory so far, where the system allows it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        print("the peak RSS includes what was in use before")


def peak_mb() -> float:
    """Peak resident memory of the process since `reset_peak`, libraries included."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
