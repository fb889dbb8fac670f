"""Everything that one GPU can tell about this package, by one command of at most nine minutes.

    bench/gpu_suite.sh --out DIR                 all steps, each with its own time budget; call it again to go on
    bench/gpu_suite.sh --out DIR --retry         the same, and what failed or was missing once more
    bench/gpu_suite.sh --out DIR --tiny --device cpu      the logic of every step on tiny shapes, without a GPU
    python -m omnigene_fast.bench.gpu_suite STEP --out DIR     one step
    python -m omnigene_fast.bench.gpu_suite predict            what the model of the kernels expects on an H100

Nothing is fetched from a network. Besides DIR, only the caches of compiled kernels are written: Triton's
(TRITON_CACHE_DIR, else ~/.triton), torch's of compiled graphs, and the package's own of CUDA C++ kernels, in the
folder cubin of its cache (OMNIGENE_FAST_CACHE, else ~/.cache/omnigene-fast). Every step leaves DIR/status/STEP.json
(state, why, seconds) and DIR/logs/STEP.log; what it found stands in DIR/STEP.json or, for measured rows, in
DIR/rows/STEP.json, and is written after every case; DIR/commits.json says which commit of the checkout it was found
with. A step that is cut off goes on with the case it was in; one that fails, or misses a tool, says why and stops no
other. With --retry such a step drops what it found wrong and works on that again, and keeps the rest. DIR/summary.md
sums up, and DIR/results.json holds the rows as `bench/results` has them: copied there under the name that the summary
gives, they are published by `make tables`.
"""
