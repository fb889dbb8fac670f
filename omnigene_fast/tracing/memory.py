"""Counts in memory, for a trace without a directory."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .counting import count_picks
from .records import Records


class Memory:
    """What `tracing.store.Writer` is to a directory, for the counts alone; about 15 KB a document of Gemma-4-26B."""

    next_doc = 0

    def __init__(self, layers: int, num_experts: int) -> None:
        self._shape = (layers, num_experts)
        self._counts: dict[int, NDArray[np.int64]] = {}
        self._labels: dict[int, dict[str, str]] = {}
        self._tokens: dict[int, int] = {}

    def add(
        self,
        records: Records,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        hashes: Mapping[int, str] | None = None,
    ) -> None:
        """Count the picks of `records`; hashes are not kept."""
        numbers, slot = np.unique(records.doc, return_inverse=True)
        counts = count_picks(records.ids, slot.ravel(), len(numbers), self._shape[1])
        for number, of in zip(numbers.tolist(), counts, strict=True):
            before = self._counts.get(number)
            self._counts[number] = of.copy() if before is None else before + of
            self._tokens[number] = self._tokens.get(number, 0) + int((records.doc == number).sum())
            self._labels.setdefault(number, {}).update((labels or {}).get(number, {}))

    def drop(self, tokens: int) -> None:
        """Nothing notes what was dropped but the trace itself."""

    def documents(self) -> dict[int, int]:
        """Tokens per document."""
        return dict(self._tokens)

    def snapshot(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[dict[str, str]]]:
        """Document ids [D], ascending; counts [D, L, E]; labels of each document."""
        numbers = sorted(self._counts)
        counts = np.zeros((len(numbers), *self._shape), np.int64)
        for row, number in enumerate(numbers):
            counts[row] = self._counts[number]
        return np.array(numbers, np.int64), counts, [self._labels[number] for number in numbers]

    def commit(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Nothing is open here."""
