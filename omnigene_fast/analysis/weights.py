"""Runs whose documents count the same."""

from typing import Any

from .groups import RunLike


class View:
    """A run with some attributes of its own; all others are the run's."""

    def __init__(self, run: RunLike) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Any:
        if name == "_run":  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self._run, name)


class EqualWeights(View):
    """A run whose documents have the same weight in every measure of counts; see `equal_weights`."""

    weights = "documents"


def equal_weights(run: RunLike) -> EqualWeights:
    """The same run for the measures, with documents of equal weight instead of a weight of their tokens.

    Pooling by tokens, the default, asks which experts the tokens of a group visit, and long documents decide. With
    equal weights the shares of a group are the mean of its documents' shares: which experts a document of this group
    visits. Counts of picks are then those of a group of as many picks in each layer, all documents alike. It concerns
    `divergence`, `differentiation`, `decompose`, `load`, `specialty`, `domain` and the report; what reads tokens one by
    one (co-activation, locality, vocabulary, entropy of routers) pools them as before.

    Args:
        run: an opened trace.

    Returns:
        what these functions take as a run; everything else is the run's.
    """
    return EqualWeights(run)
