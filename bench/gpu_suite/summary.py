"""Step "summary": DIR/summary.md and DIR/results.json from what the other steps have left so far."""

from pathlib import Path
from typing import Any

from .. import goals, report, report_gpu
from ..runner import Row
from . import revision, status

ROWS = ("table", "decode", "model")


def run(context: status.Context) -> str | None:
    """Write both files; nothing is measured."""
    from .__main__ import STEPS

    rows = collect(context.out)
    if rows:
        report.save(rows, context.out / "results.json")
    environment = status.load_json(context.out / "environment.json", {})
    steps = [status.read(context.out, step) for step in STEPS if step != "summary"]
    text = page(rows, environment, steps, revision.mixture(context.out))
    beside = context.out / "summary.md.new"
    beside.write_text(text + "\n")
    beside.replace(context.out / "summary.md")
    print(text)
    return None


def collect(out: Path) -> list[Row]:
    """The rows of all steps, in the order of the operations."""
    rows: list[Row] = []
    for name in ROWS:
        path = out / "rows" / f"{name}.json"
        if path.exists():
            rows = report.merged(rows, report.load(path))
    return rows


def page(rows: list[Row], environment: dict[str, Any], steps: list[status.Status], mixture: str = "") -> str:
    """The summary as markdown; `mixture` is the sentence on rows of several commits."""
    parts = ["# GPU suite", *filter(None, [mixture]), _machine(environment), "## Steps", _steps(steps)]
    if rows:
        parts += ["## Goals", _about_goals(rows), report_gpu.goals_table(rows)]
        lost = report_gpu.losses(rows)
        parts += ["## Where we lose", "\n".join(f"- {line}" for line in lost) if lost else "Nowhere in these rows."]
        file = f"{environment.get('slug', 'gpu')}.json"
        parts += ["## Rows", report_gpu.heading(rows, file), *report_gpu.tables(rows)]
        parts.append(f"To publish: copy `results.json` to `bench/results/{file}`, then `make tables`.")
    else:
        parts.append("No row was measured.")
    return "\n\n".join(parts)


def _machine(environment: dict[str, Any]) -> str:
    if not environment:
        return "The step `environment` has left nothing."
    fields, probe = environment["fields"], environment.get("probe")
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in fields["versions"].items())
    lines = [
        f"{fields['device']}, {fields['date']}, {fields['backend']} kernels; {versions}; CUDA {environment['cuda']}.",
        f"C++ module: {environment['cpp_module']}.",
    ]
    if "decode" in environment:  # a directory of an earlier version of the suite has none
        lines.append(f"Decode: {environment['decode']}.")
    if git := environment.get("git"):
        lines.append(f"Commit {git['commit']}{', with changes' if git['dirty'] else ''}.")
    if probe is not None:
        peak = probe["peak_gflop_s"] / 1e3
        lines.append(f"Measured: {probe['bandwidth_gb_s']:,.0f} GB/s, {peak:,.1f} TFLOP/s ({probe['kind']}).")
    smi = environment.get("nvidia_smi_after_load", environment["nvidia_smi"])
    lines.append(smi + "." if isinstance(smi, str) else "; ".join(f"{key} {value}" for key, value in smi.items()) + ".")
    lines += [f"Without `{name}`: {without}." for name, without in environment["missing"].items()]
    lines += [f"No `{name}`." for name, path in environment["tools"].items() if path is None]
    return "\n".join(f"- {line}" for line in lines)


def _steps(steps: list[status.Status]) -> str:
    lines = ["| step | state | seconds | |", "|---|---|--:|---|"]
    for step in steps:
        state = "not run" if step.state == "new" else "cut off" if step.state == "running" else step.state
        lines.append(f"| {step.step} | {state} | {step.seconds:.0f} | {step.reason.replace('|', '/')} |")
    return "\n".join(lines)


def _about_goals(rows: list[Row]) -> str:
    judged = goals.judge(rows)
    counts = [sum(each.met is state for each in judged) for state in (True, False, None)]
    text = f"{counts[0]} met, {counts[1]} missed, {counts[2]} not measured."
    if not any(map(goals.holds, rows)):
        text += " They are meant for an H100 at the true shape in bfloat16, which this is not."
    return text
