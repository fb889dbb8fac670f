"""Fast, exact and observable mixture-of-experts for Gemma-4, as a drop-in for transformers.

Importing this package registers the experts implementation "omnigene_fast" with transformers. It needs neither triton
nor a GPU: the kernels are imported by the first call that runs them, and what makes, reads, replays and analyses traces
by the first use of its name.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import autograd as _autograd  # noqa: F401  (registers the operators' autograd rule)
from . import ops
from .integrations.transformers import accelerate, restore

if TYPE_CHECKING:
    from . import analysis
    from .tracing.callback import RouterTraceCallback
    from .tracing.capture import trace
    from .tracing.replay import replay
    from .tracing.run import open_trace

__all__ = [
    "RouterTraceCallback",
    "__version__",
    "accelerate",
    "analysis",
    "open_trace",
    "ops",
    "replay",
    "restore",
    "trace",
]

_LATER = {
    "RouterTraceCallback": ".tracing.callback",
    "analysis": ".analysis",
    "open_trace": ".tracing.run",
    "replay": ".tracing.replay",
    "trace": ".tracing.capture",
}

try:
    __version__ = version("omnigene-fast")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LATER[name], __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__:
            raise
        raise ModuleNotFoundError(
            f"omnigene_fast.{name} needs the package {error.name}: pip install 'omnigene-fast[trace]'.", name=error.name
        ) from None
    value = module if name == "analysis" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
