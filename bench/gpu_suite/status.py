"""How a step begins, is limited in time, and ends: the status file that a later call goes by."""

import datetime
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# A step is over in these states; "running" (cut off) and "partial" (its time was up, and it can go on) are not.
FINISHED = ("ok", "failed", "missing", "out of time")
MAX_CUTS = 2  # a step that was cut off this often without anything new to show is given up


class MissingTool(Exception):
    """The step cannot run here; the message says what is missing."""


class OutOfTime(BaseException):
    """The step's time is up: not an Exception, so that no handler of a provider's crash takes it."""


class DeviceLost(Exception):
    """A kernel has broken the process' CUDA context: only a new process can go on."""


@dataclass
class Status:
    """What DIR/status/STEP.json holds."""

    step: str
    state: str = "running"
    reason: str = ""
    seconds: float = 0.0  # over all attempts
    cuts: int = 0  # attempts since the last progress that did not come to an end
    budget: float = 0.0
    date: str = ""


@dataclass
class Context:
    """Where a step writes, what it runs on, and how long it may take."""

    out: Path
    device: torch.device
    tiny: bool = False
    budget: float = 60.0
    whole: bool = True  # whether `budget` is all that the step is meant to have
    started: float = field(default_factory=time.monotonic)
    step: str = ""
    lost: bool = False  # the device, for this process
    retry: bool = False  # whether what was found wrong before is dropped, so that it is worked on again

    @property
    def left(self) -> float:
        """Seconds until the step's time is up."""
        return self.budget - (time.monotonic() - self.started)

    def tries(self, name: str) -> int:
        """How often a case of this step was begun before, counting this time from now on."""
        path = self.out / "status" / f"{self.step}.tries.json"
        tries = load_json(path, {})
        before = int(tries.get(name, 0))
        save_json(path, tries | {name: before + 1})
        return before

    def progressed(self) -> None:
        """Something new is on disk: being cut off from here on is no failure."""
        status = read(self.out, self.step)
        status.cuts = 0
        write(self.out, status)


def path_of(out: Path, step: str) -> Path:
    """The step's status file."""
    return out / "status" / f"{step}.json"


def read(out: Path, step: str) -> Status:
    """The step's status; a new one if there is none, or if it cannot be read."""
    try:
        return Status(**json.loads(path_of(out, step).read_text()))
    except (OSError, ValueError, TypeError):
        return Status(step, state="new")


def write(out: Path, status: Status) -> None:
    """Replace the step's status file."""
    save_json(path_of(out, status.step), asdict(status))


def save_json(path: Path, value: Any) -> None:
    """Write JSON beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def load_json(path: Path, default: Any) -> Any:
    """What a step has written before; `default` if it has not."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def run(context: Context, step: str, function: Callable[[Context], str | None]) -> Status:
    """Run one step unless it is over, within its time, and leave its status behind.

    `function` returns None if all is well, or a sentence on what it found wrong; what it can keep of its work it must
    have written by the time it is interrupted.
    """
    context.step = step
    status = read(context.out, step)
    if status.state in FINISHED:
        print(f"{step}: {status.state}, done before")
        return status
    if status.cuts >= MAX_CUTS:
        return _end(context, status, "out of time", f"was cut off {status.cuts} times with nothing new to show")
    before = status.seconds
    status.state, status.reason, status.budget = "running", "", context.budget
    status.cuts += 1
    status.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(context.out, status)
    try:
        with _limited(context.left):
            problem = function(context)
        state, reason = ("failed", problem) if problem else ("ok", "")
    except MissingTool as missing:
        state, reason = "missing", str(missing)
    except OutOfTime:
        state, reason = _interrupted(context)
    except DeviceLost as lost:
        context.lost = True
        state, reason = "partial", str(lost)
    except Exception as crash:  # one step's crash is its result; the others still run
        traceback.print_exc()
        state, reason = "failed", sentence(crash)
    status = read(context.out, step)
    status.seconds = round(before + time.monotonic() - context.started, 1)
    return _end(context, status, state, reason)


def each(
    context: Context, path: Path, names: Iterable[str], work: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What `work` finds for each name, kept in `path` after each; an exception becomes its {"problem": ...}.

    Names that are in `path` already are not worked on again, nor are those that have ended the process twice.

    Raises:
        DeviceLost: this process can launch nothing any more; what was found is kept.
    """
    done: dict[str, dict[str, Any]] = load_json(path, {})
    if context.retry:
        done = {name: found for name, found in done.items() if not found.get("problem")}
        save_json(path, done)
    for name in names:
        if name in done:
            continue
        if context.tries(name) >= MAX_CUTS:
            done[name] = {"problem": f"ended the process {MAX_CUTS} times"}
        else:
            try:
                done[name] = work(name)
            except Exception as crash:  # that is this case's result
                traceback.print_exc()
                done[name] = {"problem": sentence(crash)}
        save_json(path, done)
        context.progressed()
        check_device(context)
    return done


def problems(done: dict[str, dict[str, Any]]) -> str | None:
    """One sentence of the cases with a problem, None if there are none."""
    wrong = [f"{name}: {found['problem']}" for name, found in done.items() if found.get("problem")]
    print("\n".join(wrong) if wrong else f"{len(done)} cases, no problem", flush=True)
    if not wrong:
        return None
    return f"{len(wrong)} of {len(done)} cases: " + "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")


def check_device(context: Context) -> None:
    """DeviceLost if the process' CUDA context is broken: an illegal access is sticky."""
    if context.device.type == "cuda":
        try:
            torch.cuda.synchronize(context.device)
        except RuntimeError as error:
            raise DeviceLost(sentence(error)) from None


def sentence(crash: BaseException) -> str:
    """The kind and the first line of an exception."""
    lines = str(crash).strip().splitlines() or [""]
    return f"{type(crash).__name__}: {lines[0][:300]}"


def _interrupted(context: Context) -> tuple[str, str]:
    """Goes on in the next call if it had less than its time, or got somewhere in it."""
    unfinished = not context.whole or read(context.out, context.step).cuts == 0
    return ("partial" if unfinished else "out of time"), f"its {context.budget:.0f} s were up"


def _end(context: Context, status: Status, state: str, reason: str) -> Status:
    status.state, status.reason = state, reason
    if state == "partial":
        status.cuts = 0
    write(context.out, status)
    print(f"{status.step}: {state}{': ' + reason if reason else ''} ({status.seconds:.1f} s)")
    return status


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """OutOfTime is raised in the main thread when the time is up."""

    def expire(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, expire)
    # Again and again: an exception that is raised within a destructor is only printed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
