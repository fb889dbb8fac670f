"""`RouterTraceCallback`: how evenly the experts are loaded, beside the loss in any of Trainer's loggers."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from .capture import Tracer
from .counting import count_picks
from .records import KINDS, Records
from .scribe import Labels

logger = logging.getLogger("omnigene_fast")


class RouterTraceCallback(TrainerCallback):
    """Log bounded scalars about the routers' load: `Trainer(..., callbacks=[RouterTraceCallback(every=100)])`.

    Every `every` optimizer steps the counts of the step's tokens (padding and gradient checkpointing's second forward
    left out, summed over processes) become nine scalars in the log of that step, whatever the logger:

    - router/max_vio_mean, max_vio_max: load of a layer's busiest expert over the mean load, minus 1, over layers;
    - router/cv_p50, cv_p95: standard deviation of a layer's load over its mean, quantiles over layers;
    - router/dead_fraction: experts, over all layers, that no token visited; with few tokens many are idle by chance;
    - router/entropy: of a layer's load in nats, mean over layers, between ln K and ln E;
    - router/effective_experts: exp(entropy), mean over layers;
    - router/tokens: that were counted; router/dropped: that were not, because the writer fell behind.

    What goes wrong while a step is measured is logged, and training goes on. With `torch_compile=True` Trainer wraps
    the model where this callback cannot see its calls: nothing is measured, and the log says so.

    Args:
        every: optimizer steps from one measurement to the next; the steps between run without a trace.
        path: also keep the measured steps as a run there, for `open_trace`.
        labels: of its documents.

    Raises:
        ValueError: `every` below 1.
    """

    def __init__(self, every: int = 100, *, path: str | Path | None = None, labels: Labels | None = None) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {every!r}.")
        self.every, self._path, self._labels = every, path, labels
        self._tracer: _LoadTracer | None = None
        self._scalars: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move to the front of Trainer's callbacks, so that the loggers see what this one adds to a log."""
        caller = inspect.currentframe()
        handler = caller.f_back.f_locals.get("self") if caller and caller.f_back else None
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        else:
            logger.warning("RouterTraceCallback: loggers that come before it in Trainer's callbacks will not see it.")
        self._leave()

    def _leave(self) -> None:
        """Leave the model as it was, also when a step was not finished; Trainer does not tell when one failed."""
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            tracer.abandon()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the trace of a step that is measured."""
        self._leave()
        if state.global_step % self.every == 0:
            try:
                self._tracer = _LoadTracer(kwargs["model"], self._path, self._labels)
                self._tracer.__enter__()
            except Exception as error:
                _warn(error)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it, and ask for a log of this step."""
        if self._tracer is None:
            return
        tracer, self._tracer = self._tracer, None
        try:
            tracer.close()
        except Exception as error:  # no reason to lose a training run
            _warn(error)
            tracer.abandon()
        self._scalars = tracer.scalars()  # on every process, whatever happened on this one
        control.should_log = control.should_log or bool(self._scalars)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the scalars to the log that the step has asked for."""
        if self._scalars and logs is not None:
            logs.update(self._scalars)
            if state.log_history:
                state.log_history[-1].update(self._scalars)
            self._scalars = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._leave()


def _warn(error: Exception) -> None:
    logger.warning("RouterTraceCallback: this step is not measured, or not by this process. %s", error)


class _LoadTracer(Tracer):
    """A trace whose counts are summed over documents as they come."""

    def __init__(self, model: Any, path: str | Path | None, labels: Labels | None) -> None:
        super().__init__(model, path, labels=labels, record=KINDS if path is not None else ())
        self._device = next(model.parameters()).device
        self._load = _Load(len(self.layers), self.num_experts)

    def _open_store(self) -> Any:
        store = super()._open_store() if self.path is not None and self._owner else None
        self._load = _Load(len(self.layers), self.num_experts, store)
        return self._load

    def scalars(self) -> dict[str, float]:
        """What the callback logs; nothing if no process has counted a token."""
        counts = torch.from_numpy(self._load.counts).to(self._device)
        numbers = torch.tensor([self.tokens, self.dropped], device=self._device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for each in (counts, numbers):
                torch.distributed.all_reduce(each)
        tokens, dropped = numbers.tolist()
        if not tokens:
            return {}
        return load_scalars(counts.cpu().numpy()) | {"router/tokens": tokens, "router/dropped": dropped}


class _Load:
    """Picks [L, E] of all documents together, handed on to a run if there is one."""

    def __init__(self, layers: int, num_experts: int, store: Any = None) -> None:
        self.counts = np.zeros((layers, num_experts), np.int64)
        self._store = store
        self.next_doc = 0 if store is None else store.next_doc

    def add(
        self,
        records: Records,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        hashes: Mapping[int, str] | None = None,
    ) -> None:
        self.counts += count_picks(records.ids, np.zeros(len(records), np.int64), 1, self.counts.shape[1])[0]
        if self._store is not None:
            self._store.add(records, labels, hashes)

    def documents(self) -> dict[int, int]:
        return {} if self._store is None else self._store.documents()

    def drop(self, tokens: int) -> None:
        if self._store is not None:
            self._store.drop(tokens)

    def commit(self) -> None:
        if self._store is not None:
            self._store.commit()

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def load_scalars(counts: NDArray[np.int64]) -> dict[str, float]:
    """The callback's measures of the load from picks [L, E]; layers without picks are left out."""
    load = counts[counts.sum(1) > 0].astype(np.float64)
    if not len(load):
        return {}
    mean = load.mean(1)
    share = load / load.sum(1, keepdims=True)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), 1)
    violation, cv = load.max(1) / mean - 1, load.std(1) / mean
    return {
        "router/max_vio_mean": float(violation.mean()),
        "router/max_vio_max": float(violation.max()),
        "router/cv_p50": float(np.quantile(cv, 0.5)),
        "router/cv_p95": float(np.quantile(cv, 0.95)),
        "router/dead_fraction": float((load == 0).mean()),
        "router/entropy": float(entropy.mean()),
        "router/effective_experts": float(np.exp(entropy).mean()),
    }
