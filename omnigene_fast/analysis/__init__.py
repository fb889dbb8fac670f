"""Measures of router traces, each with its correction, interval and noise floor; the unit of all is the document."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .coactivation import coactivation, coactivation_counts, flow, flow_counts
from .decomposition import decompose, decomposition_of
from .divergence import (
    differentiation,
    divergence,
    divergence_summary,
    divergence_tables,
    generalized_js,
    js_divergence,
)
from .entropy import router_entropy
from .given import given_tokens
from .load import load
from .locality import locality
from .pairwise import pairwise
from .replay import replay_distance, saturation
from .resampling import benjamini_hochberg
from .specialty import domain, specialty
from .vocabulary import vocabulary, vocabulary_summary
from .weights import equal_weights

if TYPE_CHECKING:
    from .report import report

__all__ = [
    "benjamini_hochberg",
    "coactivation",
    "coactivation_counts",
    "decompose",
    "decomposition_of",
    "differentiation",
    "divergence",
    "divergence_summary",
    "divergence_tables",
    "domain",
    "equal_weights",
    "flow",
    "flow_counts",
    "generalized_js",
    "given_tokens",
    "js_divergence",
    "load",
    "locality",
    "pairwise",
    "replay_distance",
    "report",
    "router_entropy",
    "saturation",
    "specialty",
    "vocabulary",
    "vocabulary_summary",
]


class _Package(ModuleType):
    """The package: `report` is the function, also once the module of that name (which brings plotly) is loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.report if name == "report" and isinstance(value, ModuleType) else value)

    def __getattr__(self, name: str) -> Any:
        if name != "report":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(".report", __name__).report


sys.modules[__name__].__class__ = _Package
