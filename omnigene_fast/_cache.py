"""Where this package keeps what it has compiled and measured for a user."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """$OMNIGENE_FAST_CACHE/`name`, else omnigene-fast/`name` in $XDG_CACHE_HOME or ~/.cache; need not exist."""
    if own := os.environ.get("OMNIGENE_FAST_CACHE"):
        return Path(own).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnigene-fast" / name
