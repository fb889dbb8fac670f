"""Run every script of the workflow, each on what the one before left, and make one page of what they found.

    make examples                                             all, on a small model, stock and accelerated
    python examples/omnigene/run_all.py --quick               the same in small, seconds each
    python examples/omnigene/run_all.py --only cpt sft audit  some, with what they need

Everything goes to --out, a folder for each script, and index.html shows the tables, pictures and reports.
"""

import argparse
import base64
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@dataclass(frozen=True)
class Job:
    """A script with its arguments, in which {name} stands for the folder of another; `quick` makes it small."""

    script: str
    arguments: str
    quick: str = ""
    needs: tuple[str, ...] = ()
    processes: int = 1


TUNE = "--steps 40 --lr 1e-3"  # what a small model needs; the default is a checkpoint's
JOBS = {
    "cpt": Job("cpt.py", "--compare", "--steps 3 --batch 2 --length 128"),
    "sft": Job(
        "sft.py", f"--compare --model {{cpt}}/model {TUNE}", "--steps 3 --batch 2 --length 400 --limit 8", ("cpt",)
    ),
    "audit": Job(
        "audit.py",
        "--compare --models {cpt}/base {cpt}/model {sft}/model --length 128",
        "--length 48 --texts 4 --pairs 4 --permutations 50",
        ("cpt", "sft"),
    ),
    "homology": Job("homology.py", "--compare --model {sft}/model", "--limit 4", ("sft",)),
    "true_false": Job("true_false.py", "--compare --model {sft}/model", "--limit 4", ("sft",)),
    "dual_head": Job(
        "dual_head.py", "--compare --model {cpt}/model --lr 1e-3", "--steps 2 --batch 2 --limit 6", ("cpt",)
    ),
    "multimodal": Job("multimodal.py", "--compare", "--steps 1 --limit 4 --batch 2 --tokens 8"),
    "ddp": Job(
        "cpt.py",
        "--compare --model {cpt}/base --steps 10 --batch 4",
        "--steps 2 --batch 1 --length 64",
        ("cpt",),
        processes=2,
    ),
    "fsdp": Job(
        "cpt.py",
        "--compare --model {cpt}/base --steps 10 --batch 4 --fsdp",
        "--steps 2 --batch 1 --length 64",
        ("cpt",),
        processes=2,
    ),
    "expert_parallel": Job("expert_parallel.py", "--compare --reference --model {cpt}/base", "", ("cpt",), processes=2),
    "audit_dask": Job("audit_dask.py", "{audit}/traces/accelerated/sft", "", ("audit",)),
}


@dataclass
class Outcome:
    """How a script ended."""

    command: str
    seconds: float
    error: str = ""  # its last line, if it failed


def main() -> None:
    """Run the scripts and write the page."""
    options = arguments()
    if importlib.util.find_spec("jinja2") is None:
        sys.exit("run_all: jinja2 is not installed; install it with: pip install jinja2")
    chosen = with_needs(options.only or list(JOBS))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "index.html").unlink(missing_ok=True)  # that of an earlier run
    outcomes: dict[str, Outcome] = {}
    running: dict[Any, str] = {}
    waiting = list(chosen)
    bar = tqdm(total=len(chosen), desc="examples", unit="script")
    with ThreadPoolExecutor(options.jobs) as pool, bar:
        while waiting or running:
            for name in [name for name in waiting if not set(JOBS[name].needs) - set(outcomes)]:
                waiting.remove(name)
                failed = [need for need in JOBS[name].needs if outcomes[need].error]
                if failed:
                    outcomes[name] = Outcome("", 0.0, f"not run, because {failed[0]} failed")
                    bar.update()
                else:
                    running[pool.submit(run, name, options)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            for future in done:
                name = running.pop(future)
                outcomes[name] = future.result()
                bar.update()
                ending = outcomes[name].error or "done"
                bar.write(f"{name}: {ending} ({outcomes[name].seconds:.0f} s)", file=sys.stderr)
    write_page(options, {name: outcomes[name] for name in chosen})
    failed = [f"{name} ({outcomes[name].error})" for name in chosen if outcomes[name].error]
    print(options.out / "index.html")
    if failed:
        sys.exit(f"run_all: {len(failed)} of {len(chosen)} scripts did not end well: {'; '.join(failed)}")


def with_needs(names: Sequence[str]) -> list[str]:
    """The chosen jobs and what they need, in the order of JOBS."""
    wanted = set(names)
    for name in reversed(JOBS):
        if name in wanted:
            wanted.update(JOBS[name].needs)
    return [name for name in JOBS if name in wanted]


def run(name: str, options: argparse.Namespace) -> Outcome:
    """One script to its end; what it prints goes to log.txt in its folder."""
    job, folder = JOBS[name], options.out / name
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    chosen = by_option(job.arguments) | (by_option(job.quick) if options.quick else {})
    places = {other: str(options.out / other) for other in JOBS}
    each = [part.format(**places) for option, values in chosen.items() for part in (option, *values) if part]
    threads = options.threads and max(1, options.threads // job.processes)
    each += ["--out", str(folder), *(["--threads", str(threads)] if threads else [])]
    launch = TORCHRUN if job.processes > 1 else ()
    command = [sys.executable, *launch, str(HERE / job.script), *each]
    begin = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        loud = os.environ | {"OMNIGENE_FAST_TRACEBACK": "1"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=loud, check=False).returncode
    shown = shlex.join(["python", *launch, f"examples/omnigene/{job.script}", *each])
    last = [line for line in (folder / "log.txt").read_text().splitlines() if line.strip()] or [""]
    own = [line for line in last if line.startswith(f"{Path(job.script).stem}: ")]
    error = "" if code == 0 else (own or last)[-1][:400]
    return Outcome(shown, time.perf_counter() - begin, error)


def by_option(text: str) -> dict[str, list[str]]:
    """The words of a command line by the option that they follow, "" for those before the first."""
    found: dict[str, list[str]] = {"": []}
    option = ""
    for word in shlex.split(text):
        if word.startswith("--"):
            option = word
            found[option] = []
        else:
            found[option].append(word)
    return found


def write_page(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    """index.html: every result in the order of the workflow, pictures within it, reports beside it."""
    from jinja2 import Environment, FileSystemLoader

    sections = []
    for name, outcome in outcomes.items():
        result = options.out / name / "result.json"
        content = json.loads(result.read_text()) if result.is_file() else {"title": name, "about": "", "parts": []}
        for part in content["parts"]:
            if part["kind"] == "picture":
                part["data"] = base64.b64encode((options.out / name / part["file"]).read_bytes()).decode()
        sections.append({"name": name, "outcome": outcome, **content})
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("page.html.jinja").render(
        sections=sections, quick=options.quick, machine=machine(), ways=ways(sections)
    )
    beside = options.out / "index.html.new"
    beside.write_text(text, encoding="utf-8")
    beside.rename(options.out / "index.html")


def ways(sections: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Every measurement of stock and accelerated, one after the other in a table of its own, as one row."""
    rows = []
    for section in sections:
        for part in section["parts"]:
            if part["kind"] == "table" and {"way", "tokens/s", "speed-up"} <= set(part["columns"]):
                cells = [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]]
                for stock, ours in zip(cells[::2], cells[1::2], strict=True):
                    title = section["title"] if part["title"].startswith("Speed and memory") else part["title"]
                    row = {"script": section["name"], "what": stock.get("stage", title)}
                    row |= {"stock": stock["tokens/s"], "accelerated": ours["tokens/s"], "speed-up": ours["speed-up"]}
                    row |= {f"MB, {each['way']}": each["peak MB beyond the model"] for each in (stock, ours)}
                    rows.append(row)
    return rows


def machine() -> str:
    """What the figures were measured on."""
    import torch
    import transformers

    from omnigene_fast import info

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{info.device_name(device)}, {versions}, {time.strftime('%Y-%m-%d')}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="few steps and few questions: it shows that all runs, not what comes out")
    add("--only", nargs="+", choices=list(JOBS), metavar="SCRIPT", help=f"of {', '.join(JOBS)}")
    add("--jobs", type=int, help="scripts at a time (default: 1, so that timings are clean; 2 with --quick)")
    add("--threads", type=int, help="CPU threads of each (default: 1 with --quick, else as torch chooses)")
    add("--out", type=Path, default=Path("out"), help="directory for everything made (default: %(default)s)")
    options = parser.parse_args()
    options.jobs = options.jobs or (2 if options.quick else 1)
    options.threads = options.threads or (1 if options.quick else None)
    return options


if __name__ == "__main__":
    main()
