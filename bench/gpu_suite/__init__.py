"""Everything that one GPU can tell about this package, by one command of at most nine minutes.

    bench/gpu_suite.sh --out DIR                 all steps, each with its own time budget; call it again to go on
    bench/gpu_suite.sh --out DIR --retry         the same, and what failed or was missing once more
    bench/gpu_suite.sh --out DIR --tiny --device cpu      the logic of every step on tiny shapes, without a GPU
    python -m omnigene_fast.bench.gpu_suite STEP --out DIR     one step
    python -m omnigene_fast.bench.gpu_suite predict            what the model of the kernels expects on an H100

Nothing is fetched from a network, and nothing but DIR is written. Every step leaves DIR/status/STEP.json (state, why,
seconds) and DIR/logs/STEP.log; what it found stands in DIR/STEP.json or, for measured rows, in DIR/rows/STEP.json, and
is written after every case. A step that is cut off goes on with the case it was in; one that fails, or misses a tool,
says why and stops no other. DIR/summary.md sums up, and DIR/results.json holds the rows as `bench/results` has them:
copied there under the name that the summary gives, they are published by `make tables`.
"""
