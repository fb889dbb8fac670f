"""`trace`: records which experts every token visits, where the router decides it.

The model's thread copies what the gates have written and goes on; the rest happens in another one (`scribe.py`).
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import reference
from ..integrations import gemma4
from .buffers import Buffers, to_host
from .calls import (
    Call,
    Streams,
    Watch,
    cache_of,
    cached_tokens,
    cached_valid,
    describe,
    put_hook,
    take_hook,
    valid_tokens,
)
from .description import describe_model, end_tokens, owns_the_decision, process_rank, shape_of_routers
from .identity import Generation, Stream, parse_doc_ids
from .labels import check_name, check_text
from .memory import Memory
from .pump import POLICIES, Pump, parse_bytes
from .records import KINDS, check_record, unrouted_fault
from .scribe import Handover, Labels, Scribe

logger = logging.getLogger("omnigene_fast")

Mask = Tensor | Callable[[Mapping[str, Any]], Tensor]


def trace(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    labels: Labels | None = None,
    record: Sequence[str] = KINDS,
    mask: Mask | None = None,
    budget: int | str = "2GiB",
    on_full: str = "block",
    segment_tokens: int = 65536,
    max_tokens: int = 0,
    rank: int | None = None,
    meta: Mapping[str, Any] | None = None,
) -> "Tracer":
    """Record which experts the tokens of `model` visit: `with trace(model, "runs/cpt") as tr: model(**batch)`.

    Works with padded and packed batches, `generate`, training with and without gradient checkpointing, and under
    `torch.compile`. Each row of a call is a document, unless it continues a cached sequence, packs several (its
    position_ids begin anew at 0) or `Tracer.label` numbers them. On an accelerated model the gate itself writes the
    record; on a stock model forward hooks on the routers do, which is slower, and the log says so.

    Args:
        model: Gemma-4 with routers, bare or wrapped (PEFT, DDP, torch.compile).
        path: directory of the run; an existing run of the same model is continued. None keeps the counts in memory and
            nothing else.
        labels: of every document, name -> text, or name -> one text per row of a call; `Tracer.label` changes them.
        record: which of "ids", "weights" (of the chosen experts, float16) and "stats" (entropy of the softmax in nats,
            probability mass of the chosen, margin p_K - p_(K+1), float16) to keep per token. Counts are always kept.
        mask: which tokens to record, instead of the attention_mask of the call: [B, S], or a function of the call's
            arguments that returns one, such as `lambda inputs: inputs["labels"] != -100`.
        budget: bytes that may wait for the writer, a number or a text such as "2GiB".
        on_full: when more would wait: "block" the model, "drop" the tokens of the call (`Tracer.dropped` counts them)
            or "raise", which counts them too.
        segment_tokens: tokens that are made durable together, or fewer at the first call after a minute; a crash loses
            at most these.
        max_tokens: tokens per call to reserve memory for at once, so that its addresses do not change later (CUDA
            graphs); it grows by itself otherwise.
        rank: number of this writer; by default that of torch.distributed. Under tensor or expert parallelism only the
            first rank of a group writes.
        meta: more facts for meta.json, such as {"tokenizer": "bytes"}.

    Returns:
        a `Tracer`, a context manager. Leaving it raises RuntimeError if nothing was recorded.

    Raises:
        TypeError, ValueError: a wrong argument; no router in `model`.
        FileExistsError, RuntimeError: on entering, if `path` is something else, or has a live writer of this rank.
    """
    return Tracer(
        model,
        path,
        labels=labels,
        record=record,
        mask=mask,
        budget=budget,
        on_full=on_full,
        segment_tokens=segment_tokens,
        max_tokens=max_tokens,
        rank=rank,
        meta=meta,
    )


class Tracer:
    """A running trace; see `trace`. Not for several models at once, nor for calls from several threads."""

    def __init__(
        self,
        model: nn.Module,
        path: str | Path | None,
        *,
        labels: Labels | None = None,
        record: Sequence[str] = KINDS,
        mask: Mask | None = None,
        budget: int | str = "2GiB",
        on_full: str = "block",
        segment_tokens: int = 65536,
        max_tokens: int = 0,
        rank: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
        self._record = check_record(record)
        if on_full not in POLICIES:
            raise ValueError(f"on_full: expected one of {', '.join(POLICIES)}, got {on_full!r}.")
        if mask is not None and not isinstance(mask, Tensor) and not callable(mask):
            raise TypeError(f"mask: expected a tensor [B, S], a function or None, got {type(mask).__name__}.")
        if not isinstance(max_tokens, int) or max_tokens < 0:
            raise ValueError(f"max_tokens: expected an integer >= 0, got {max_tokens!r}.")
        self._budget = parse_bytes(budget)
        self._routers = gemma4.routers_by_layer(model)
        self._model, self._mask, self._on_full = model, mask, on_full
        self.path = None if path is None else Path(path)
        self._rank = process_rank() if rank is None else rank
        self._owner = owns_the_decision(model)
        self._segment_tokens, self._max_tokens = segment_tokens, max_tokens
        self.layers = list(self._routers)
        experts, self.top_k = shape_of_routers(self._routers)
        self.num_experts = max(experts)
        self._meta = describe_model(model, self._routers) | dict(meta or {})
        if min(experts) < max(experts):
            self._meta["experts_by_layer"] = experts
        self._labels: Labels = {}
        self._doc_ids: NDArray[np.int64] | None = None
        self._store: Any = None
        self._pump: Pump | None = None
        self._watch: Watch | None = None
        self._hooked: list[nn.Module] = []
        self._captured = False
        self._held: tuple[Handover, Call, Any] | None = None
        self._scribe: Scribe | None = None
        self.calls = 0  # forwards seen
        self.relabelled = 0  # documents whose labels were corrected or added
        self.label(**(labels or {}))

    def __enter__(self) -> "Tracer":
        if self._watch is not None:
            raise RuntimeError("trace: this trace is open already; make another one with trace().")
        if any(router.__dict__.get(_HOOKED) == id(router) for router in self._routers.values()):
            raise RuntimeError("trace: expected a model without an open trace; close the other one first.")
        self._store = self._open_store()
        try:
            self._open()
        except BaseException:
            self.abandon()
            raise
        return self

    def _open(self) -> None:
        self._scribe = Scribe(self._store, self.layers, self.num_experts, end_tokens(self._model))
        self._streams = Streams(Stream)
        self._buffers = Buffers(list(self._routers.values()), self.num_experts, self.top_k, self._record)
        self._buffers.reserve(self._max_tokens)
        self._pump = Pump(self._scribe.write, self._budget)
        self._watch = Watch(
            self._model, list(self._routers.values()), self._begin, self._end, Generation, self._release
        )
        stock = [router for router in self._routers.values() if not gemma4.is_accelerated(router)]
        if stock:
            logger.warning(
                "trace: %d of %d routers are not accelerated, forward hooks record them, which is slower;"
                " omnigene_fast.accelerate(model) records in the gate.",
                len(stock),
                len(self._routers),
            )
        for router in self._routers.values():
            router.__dict__[_HOOKED] = id(router)  # a copy of the model is not traced
        self._hooked = stock
        for router in stock:
            # Before hooks that change the output: the record is the router's decision, as an accelerated one's gate is.
            put_hook(router, _record_by_hook, first=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def abandon(self) -> None:
        """Close after an error, which matters more than what goes wrong here: that is only logged."""
        try:
            self._shut()
        except Exception:
            logger.exception("trace: closing failed too")

    def close(self) -> None:
        """Make everything durable and leave the model as it was. After an error of the disk it may be called again.

        Raises:
            RuntimeError: nothing was recorded.
            OSError, ValueError: what went wrong while writing.
        """
        was_open = self._watch is not None
        self._shut()  # also again, after a disk that was full
        if was_open and not self.tokens and not self.dropped and self._owner:
            raise RuntimeError(
                f"trace: nothing was recorded in {self.calls} calls of the model; call the model that was given to"
                " trace(), or the wrapper that compiled it, and leave some tokens unmasked."
            )
        fault = unrouted_fault(self.layers, self.unrouted.tolist()) if was_open else None
        if fault:
            warnings.warn(f"trace: {fault}", stacklevel=2)

    def _shut(self) -> None:
        self._release()
        pump, self._pump = self._pump, None
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
            for router in self._hooked:
                take_hook(router)
            for router in self._routers.values():
                router.__dict__.pop(_HOOKED, None)
            self._buffers.detach()
        try:
            if pump is not None:
                pump.close()
        finally:
            if self._store is not None:
                self._store.close()

    def label(self, *, doc_ids: Any = None, **labels: str | Sequence[str | None] | None) -> None:
        """Label the calls that follow.

        Args:
            doc_ids: numbers of the documents, one per row [B], or one per token [B, S] where a row packs several
                (negative: no document). The same number in several calls continues its document. None: automatic.
            labels: name = text, or one text per row (None: none for that row), or None to end a label. They are added
                to those given before.
        """
        merged = dict(self._labels)
        for name, value in labels.items():
            check_name(name)
            kept = value if isinstance(value, str) else tuple(value or ())  # the caller may change its list
            for text in (kept,) if isinstance(kept, str) else kept:
                if text is not None:
                    check_text(text, f"labels: expected the value of {name!r}")
            merged[name] = kept
            if value is None:
                del merged[name]
        self._labels, self._doc_ids = merged, parse_doc_ids(doc_ids)

    def relabel(self, labels: Mapping[int, Mapping[str, str]]) -> None:
        """Correct or add labels of documents that the run holds, and make them durable.

        Args:
            labels: name -> value per document id.
        """
        self._store.relabel(labels)
        self.relabelled += len(labels)

    def step(self, **inputs: Any) -> None:
        """Take the records of a forward that ran without Python, such as a replayed CUDA graph.

        The graph has to be captured while this trace is open; replayed after it, it writes where nobody reads.

        Args:
            inputs: what the model would have been called with: input_ids, attention_mask, ...

        Raises:
            ValueError: more tokens than the graph can have written.
        """
        call = describe(self._model, inputs)
        if call.rows > self._buffers.tokens:
            raise ValueError(
                f"step: expected at most {self._buffers.tokens} tokens, the memory that the gates write to, got"
                f" {call.rows}; pass max_tokens= to trace() before the graph is captured."
            )
        self._end(call, None, replayed=True)

    def settle(self) -> None:
        """Wait until the records of every call so far are with the writer."""
        if self._watch is not None and self._pump is not None:
            self._pump.flush()

    def flush(self) -> None:
        """Wait until every call so far is with the writer, and make it durable."""
        if self._watch is not None:
            self.settle()
            self._store.commit()

    @property
    def tokens(self) -> int:
        """Tokens recorded so far."""
        return 0 if self._scribe is None else self._scribe.tokens

    @property
    def dropped(self) -> int:
        """Tokens that were not recorded, because more waited for the writer than the budget allowed."""
        return 0 if self._scribe is None else self._scribe.dropped

    @property
    def unrouted(self) -> NDArray[np.int64]:
        """[L] tokens recorded so far to which a layer's router gave NaN; they count for no expert."""
        self.settle()
        return np.zeros(len(self.layers), np.int64) if self._scribe is None else self._scribe.unrouted.copy()

    @property
    def counts(self) -> NDArray[np.int64]:
        """Picks [documents, layers, experts] so far, rows by rising document number."""
        self.settle()
        counts: NDArray[np.int64] = self._store.snapshot()[1]
        return counts

    def verify(self) -> list[str]:
        """Check the run on disk; the sentences that say what is wrong with it, none if it is sound.

        Raises:
            ValueError: a trace without a path.
            RuntimeError: nothing was recorded.
        """
        from .run import open_trace

        if self.path is None:
            raise ValueError("verify: expected a trace with a path, got one that keeps its counts in memory.")
        self.flush()
        if not self.tokens:
            raise RuntimeError(f"trace: nothing was recorded in {self.calls} calls of the model.")
        return open_trace(self.path).verify()

    def _begin(self, call: Call) -> None:
        self._release()
        if self._buffers.reserve(call.rows) and self._captured:
            raise RuntimeError(
                f"trace: expected at most {self._buffers.tokens} tokens per call after a CUDA graph was captured, got"
                f" {call.rows}; pass max_tokens= to trace()."
            )
        self._buffers.attach()

    def _end(self, call: Call, output: Any, *, replayed: bool = False) -> None:
        self._buffers.detach()
        if output is None and not replayed:
            return  # the forward raised
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if not self._captured:
                _captured.append(self._buffers)
            self._captured = True
            return
        self.calls += 1
        if not self._owner or self._pump is None:
            return
        place, cache = self._streams.of(call), cache_of(call, output)
        keep = self._override(call)
        try:
            valid = valid_tokens(call)
        except ValueError:
            if keep is None:
                raise
            valid = None  # a mask that cannot be read is what `mask=` is for
        known = [valid, call.token, call.position, keep, cached_valid(call) if place.branches else None]
        # The caller may write to its tensors again.
        host = to_host([None if each is None else each.detach().clone() for each in known])
        handover = Handover(
            (call.B, call.S),
            call.training,
            host,
            call.past,
            place,
            call.generation,
            self._doc_ids,
            self._labels,
            self._buffers.take(call.rows),
            call.S,
        )
        self._streams.follow(place.stream, call, cache, call.S)
        if call.generation is not None and cache is not None and call.S > 1:
            # Some may be candidates of assisted decoding: those that are in the text are in the cache when it goes on.
            self._held = handover, call, cache
        else:
            self._put(handover)

    def _release(self) -> None:
        """Hand over a call of `generate` that waited for what becomes of its tokens."""
        if self._held is None:
            return
        (handover, call, cache), self._held = self._held, None
        handover.fed = min(max(cached_tokens(cache) - call.past, 0), call.S)
        self._streams.follow(handover.place.stream, call, cache, handover.fed)
        self._put(handover)

    def _put(self, handover: Handover) -> None:
        if self._pump is None:
            return
        assert handover.taken is not None
        size = handover.taken.nbytes + handover.tokens.nbytes
        full = self._on_full != "block" and self._pump.full(size)
        if full:
            handover.taken, size = None, 0  # positions go on
        self._pump.put(handover, size)
        if full and self._on_full == "raise":
            raise RuntimeError(
                f"trace: {self._budget:,} bytes wait for the writer, as many as budget allows; raise the budget, or"
                " pass on_full='block' or 'drop'."
            )

    def _override(self, call: Call) -> Tensor | None:
        if self._mask is None:
            return None
        keep = self._mask if isinstance(self._mask, Tensor) else self._mask(call.inputs)
        if not isinstance(keep, Tensor) or tuple(keep.shape) != (call.B, call.S):
            got = list(keep.shape) if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(f"mask: expected [B, S] = [{call.B}, {call.S}], got {got}.")
        return keep.bool()

    def _open_store(self) -> Any:
        if self.path is None or not self._owner:
            return Memory(len(self.layers), self.num_experts)
        from .store import Writer

        return Writer(
            self.path,
            self._meta | {"layers": self.layers, "num_experts": self.num_experts, "top_k": self.top_k},
            record=self._record,
            rank=self._rank,
            segment_tokens=self._segment_tokens,
        )


_HOOKED = "_omnigene_fast_traced"  # instance attribute of a router that an open trace watches: its id
_captured: list[Buffers] = []  # a CUDA graph writes to their addresses for as long as it lives


def _record_by_hook(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward hook of a router that is not accelerated: writes what a gate would have written."""
    buffers = router.__dict__.get(gemma4.TRACE)
    if buffers is None or gemma4.is_accelerated(router):
        return
    probabilities, weights, index = (each.detach().flatten(0, -2) for each in output)
    reference.record(reference.as_probabilities(probabilities), weights, index, *buffers)
