"""Scripts of examples/omnigene as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "omnigene"


def load(name: str) -> ModuleType:
    """The script `name` of the folder, imported as its neighbours import it."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)
