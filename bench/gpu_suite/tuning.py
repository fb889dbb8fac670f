"""Step "tune": a first tuning pass, by `omnigene-fast tune`; its table goes to DIR/tuned and is not used by itself."""

import sys

from omnigene_fast import info

from ..providers import installed
from . import gpu_tests, status

COMMAND = "tune"


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
    options = {option for parameter in command.params for option in parameter.opts}
    tuned = context.out / "tuned" / f"{info.slug(context.device)}.json"
    tuned.parent.mkdir(exist_ok=True)
    given = {"--budget": f"{max(5.0, context.left - 12):.0f}", "--device": str(context.device), "--out": str(tuned)}
    arguments = [word for name, value in given.items() if name in options for word in (name, value)]
    line = [sys.executable, "-c", "from omnigene_fast.cli import main; main()", COMMAND, *arguments]
    print("omnigene-fast", COMMAND, *arguments, flush=True)
    code = gpu_tests.run_group(line, gpu_tests.variables())
    return None if code == 0 else f"`omnigene-fast tune` ended with status {code}"
