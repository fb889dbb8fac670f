"""Fast, exact and observable mixture-of-experts for Gemma-4, as a drop-in for transformers.

Importing this package registers the experts implementation "omnigene_fast" with transformers. It needs neither triton
nor a GPU: the kernels are imported by the first call that runs them.
"""

from importlib.metadata import PackageNotFoundError, version

from . import autograd as _autograd  # noqa: F401  (registers the operators' autograd rule)
from . import ops
from .integrations.transformers import accelerate, restore

__all__ = ["__version__", "accelerate", "ops", "restore"]

try:
    __version__ = version("omnigene-fast")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0+unknown"
