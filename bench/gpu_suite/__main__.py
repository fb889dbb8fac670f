"""One step of the suite: `python -m omnigene_fast.bench.gpu_suite STEP --out DIR`."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Each step is a module with a function `run(context)`. Their order and time budgets stand in `bench/gpu_suite.sh`.
STEPS = {
    "environment": "environment",
    "correctness": "correctness",
    "tests": "gpu_tests",
    "table": "table",
    "decode": "decode",
    "repeat": "repeat",
    "capture": "capture",
    "model": "model",
    "sanitizer": "sanitizer",
    "tune": "tuning",
    "summary": "summary",
}


def step(name: str) -> Callable[..., str | None]:
    """The function of step `name`; imported late, so that a broken one is that step's failure."""
    return importlib.import_module(f".{STEPS[name]}", __package__).run


def process_age() -> float:
    """Seconds since this process began, importing torch and transformers among them."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run a step; the exit status is 0 unless the arguments are wrong: a step's outcome is in its status file."""
    age = process_age() if arguments is None else 0.0
    parser = argparse.ArgumentParser(prog="python -m omnigene_fast.bench.gpu_suite", description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "predict"])
    parser.add_argument("--out", type=Path, help="directory for everything that is written")
    parser.add_argument("--device", default="cuda", help="cuda[:N], or cpu; default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: the logic, not the machine")
    parser.add_argument("--retry", action="store_true", help="drop what was found wrong before, to measure it again")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds that the step may take; default: 120")
    parser.add_argument(
        "--deadline", type=float, help="seconds, from the start of the process, that it may take at most"
    )
    options = parser.parse_args(arguments)
    if options.step == "predict":
        from .predict import main as predict

        predict(options.out)
        return 0
    if options.out is None:
        parser.error("--out: expected a directory.")

    import torch

    from . import revision, status

    # A cold start takes as long as a short step: it is counted against the deadline and not against the budget.
    budget = options.budget if options.deadline is None else min(options.budget, options.deadline - age)
    whole = budget == options.budget
    context = status.Context(options.out, torch.device(options.device), options.tiny, budget, whole)
    context.retry = options.retry

    def function(context: status.Context) -> str | None:
        if context.device.type == "cuda" and options.step != "summary" and not torch.cuda.is_available():
            raise status.MissingTool("torch finds no CUDA GPU")
        if options.step != "summary":
            revision.record(context.out, options.step)
        return step(options.step)(context)

    status.run(context, options.step, function)
    if context.lost and arguments is None:
        sys.stdout.flush()
        again = [word for word in sys.argv[1:] if word != "--retry"]  # this attempt's findings are not for dropping
        os.execv(sys.executable, [sys.executable, "-m", "omnigene_fast.bench.gpu_suite", *again])
    return 0


if __name__ == "__main__":
    sys.exit(main())
