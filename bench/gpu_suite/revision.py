"""Which commit of the checkout a step ran: DIR/commits.json has the steps by commit."""

import os
import subprocess
from pathlib import Path
from typing import Any

from . import status

ROOT = Path(__file__).resolve().parents[2]
FILE = "commits.json"


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """The commit, and whether tracked files differ from it; None where this is no checkout, or git is missing."""
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "HEAD").strip()
        return {"commit": name, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def record(out: Path, step: str) -> None:
    """Note that `step` works with the present commit."""
    if (found := commit()) is None:
        return
    steps = status.load_json(out / FILE, {})
    name = found["commit"] + (", with changes" if found["dirty"] else "")
    if step not in steps.get(name, []):
        status.save_json(out / FILE, steps | {name: [*steps.get(name, []), step]})


def mixture(out: Path) -> str:
    """A sentence if the steps ran with more than one commit, "" if not."""
    steps = status.load_json(out / FILE, {})
    if len(steps) < 2:
        return ""
    parts = "; ".join(f"{name[:12]}{name[40:]}: {', '.join(ran)}" for name, ran in steps.items())
    return f"**The rows mix {len(steps)} states of the checkout** ({parts}): begin an empty directory to compare them."


def _git(root: Path, *words: str) -> str:
    # Without optional locks `status` does not write the index.
    return subprocess.run(
        ["git", *words],
        cwd=root,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    ).stdout
