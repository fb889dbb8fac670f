"""Step "tune": a first tuning pass, by `omnigene-fast tune`; its table goes to DIR/tuned and is not used by itself.

Two buckets of the forward are what a few calls can finish. What is measured stands in a journal beside the table, which
the command removes once it has measured everything: while it is there, the step is not over.
"""

import sys
from pathlib import Path

from omnigene_fast import info

from ..providers import installed
from . import gpu_tests, status

COMMAND = "tune"
TOKENS = "512,4096"


def run(context: status.Context) -> str | None:
    """Tune with what is left of the step's time."""
    from omnigene_fast.cli import main

    command = main.commands.get(COMMAND)
    if command is None:
        raise status.MissingTool("this checkout has no `omnigene-fast tune`")
    if not installed("triton"):
        raise status.MissingTool("triton is not installed: there are no Triton kernels to tune")
    if context.device.type != "cuda":
        raise status.MissingTool("tuning measures kernels on a GPU")
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    tuned = context.out / "tuned" / f"{info.slug(context.device)}.json"
    tuned.parent.mkdir(exist_ok=True)
    given = {
        "--tokens": TOKENS,
        "--budget": f"{max(5.0, context.left - 12):.0f}",
        "--device": str(context.device),
        "--out": str(tuned),
    }
    arguments = [word for name, value in given.items() if name in options for word in (name, value)]
    arguments += [option for option in ("--no-training",) if option in options]
    line = [sys.executable, "-c", "from omnigene_fast.cli import main; main()", COMMAND, *arguments]
    print("omnigene-fast", COMMAND, *arguments, flush=True)
    journal = tuned.with_name(f"{tuned.name}.part")
    before = size_of(journal)
    try:
        code = gpu_tests.run_group(line, gpu_tests.variables())
    finally:
        if size_of(journal) > before:
            context.progressed()
    if code == 0 and journal.exists():
        raise status.OutOfTime
    return None if code == 0 else f"`omnigene-fast tune` ended with status {code}"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0
