"""`replay`: route as recorded. The ids are those of a run, the weights follow from the live router at these ids."""

import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import reference
from ..integrations import gemma4
from .calls import Call, Streams, Watch, cache_of, cached_valid, valid_tokens
from .description import end_tokens, process_rank, shape_of_routers
from .identity import Generation, Numbering, Stream, parse_doc_ids
from .records import unrouted
from .run import Run, open_trace
from .store import DOCS_PER_RANK

MISSING = ("raise", "recompute")
_NONE = -1  # an id that stands for "route this token live"


def replay(model: nn.Module, run: Run | str | Path, *, missing: str = "raise") -> "Replay":
    """Route the calls of `model` as a run recorded them: `with omnigene_fast.replay(model, run): model(**batch)`.

    Tokens are found by document and position, so the calls have to bring the same documents in the same order, or be
    numbered with `Replay.label(doc_ids=...)`, as those of another rank have to be; every token's id is compared.
    Experts run in the recorded order. Their weights come from the live router: its softmax at the recorded ids, divided
    by their sum, times the per-expert scale; gradients flow. Where the live router would have chosen the same experts
    in the same order, its own weights stand, to the bit. Works in inference, `generate` and training, with gradient
    checkpointing, on accelerated and on stock models; every call waits for its token ids.

    Args:
        model: Gemma-4 with routers, of the layers and experts of the run.
        run: what `open_trace` returns, or its directory; recorded with "ids".
        missing: what to do with a token that the run does not hold, that was consumed before, or to which a router gave
            NaN when it was recorded: "raise" or "recompute", which routes it live and counts it in `Replay.recomputed`.

    Returns:
        a `Replay`, a context manager.

    Raises:
        TypeError, ValueError: a wrong argument; a run of other layers, experts or without ids.
        LookupError: within the calls, a token that the run does not hold.
    """
    return Replay(model, run, missing=missing)


class Replay:
    """A running replay; see `replay`."""

    def __init__(self, model: nn.Module, run: Run | str | Path, *, missing: str = "raise") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
        if missing not in MISSING:
            raise ValueError(f"missing: expected 'raise' or 'recompute', got {missing!r}.")
        self._run = run if isinstance(run, Run) else open_trace(run)
        self._routers = gemma4.routers_by_layer(model)
        experts, top_k = shape_of_routers(self._routers)
        by_layer = self._run.experts_by_layer
        varying = experts != by_layer and max(experts) == max(by_layer)
        found: Any = (list(self._routers), experts if varying else max(experts), top_k)
        recorded: Any = (self._run.layers, by_layer if varying else self._run.num_experts, self._run.top_k)
        if found != recorded:
            raise ValueError(
                f"run: expected layers {found[0]}, {found[1]} experts and top-{found[2]} as in the model, got layers"
                f" {recorded[0]}, {recorded[1]} experts and top-{recorded[2]}."
            )
        if "ids" not in self._run.record:
            raise ValueError(
                f"run: expected one that was recorded with 'ids', got {', '.join(self._run.record) or 'nothing'}."
            )
        self._model, self._missing = model, missing
        self._doc_ids: NDArray[np.int64] | None = None
        self._watch: Watch | None = None
        self._hooks: list[Any] = []
        self._decision: Tensor | None = None  # [L, T, K]
        self._forwards, self._in_backward = 0, False  # forwards with gradients since the last backward
        self.consumed = 0  # tokens that were routed as recorded
        self.recomputed = 0  # tokens that were routed live

    def __enter__(self) -> "Replay":
        if self._watch is not None:
            raise RuntimeError("replay: this replay is open already; make another one with replay().")
        self._records = _Records(self._run)
        self._numbering = Numbering(process_rank() * DOCS_PER_RANK, end_tokens(self._model))
        self._streams = Streams(Stream)
        self._earlier: weakref.WeakKeyDictionary[Stream, NDArray[np.int16]] = weakref.WeakKeyDictionary()
        self._watch = Watch(self._model, list(self._routers.values()), self._begin, self._end, Generation)
        self._hooks = [
            router.register_forward_hook(functools.partial(self._reroute, layer))
            for layer, router in enumerate(self._routers.values())
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        for hook in self._hooks:
            hook.remove()
        self._decision = None

    @property
    def remaining(self) -> int:
        """Recorded tokens that no call has brought yet."""
        return self._records.remaining

    def label(self, *, doc_ids: Any = None) -> None:
        """Number the documents of the calls that follow, one per row [B] or per token [B, S]; None: in order."""
        self._doc_ids = parse_doc_ids(doc_ids)

    def _begin(self, call: Call) -> None:
        valid, token, position = (
            None if each is None else each.detach().cpu().numpy()
            for each in (valid_tokens(call), call.token, call.position)
        )
        place = self._place = self._streams.of(call)
        before = cached_valid(call) if place.branches else None
        tokens = self._numbering.assign(
            place.stream,
            (call.B, call.S),
            valid,
            token,
            position,
            self._doc_ids,
            past=call.past,
            before=None if before is None else before.cpu().numpy(),
            source=place.source,
            branches=place.branches,
            generation=call.generation,
        )
        flat = np.flatnonzero(tokens.valid)
        ids = np.full((len(self._routers), call.rows, self._run.top_k), _NONE, np.int16)
        found = self._records.consume(
            tokens.doc.ravel()[flat],
            tokens.pos.ravel()[flat],
            None if token is None else token.ravel()[flat],
            ids,
            flat,
        )
        if call.generation is not None and not call.past and tokens.stream is not None:
            # Without a cache every step runs the tokens before it again: as they were routed then.
            by_row = ids.reshape(len(ids), call.B, call.S, -1)
            if tokens.known:
                by_row[:, :, : tokens.known] = self._earlier[tokens.stream][:, tokens.source]
            self._earlier[tokens.stream] = by_row
        lost = np.flatnonzero(~found)
        if lost.size and self._missing == "raise":
            at = flat[lost[0]]
            raise LookupError(
                f"replay: document {int(tokens.doc.ravel()[at])} holds no record of its token"
                f" {int(tokens.pos.ravel()[at])} that was not consumed before; bring the recorded documents in their"
                " order, number them with label(doc_ids=...), or pass missing='recompute'."
            )
        self.consumed += int(found.sum())
        self.recomputed += len(lost)
        self._forwards = int(call.training) + (0 if self._in_backward else self._forwards)
        self._in_backward = False
        device = next(iter(self._routers.values())).scale.device
        self._decision = torch.from_numpy(ids).to(device)

    def _end(self, call: Call, output: Any) -> None:
        if output is not None:
            self._streams.follow(self._place.stream, call, cache_of(call, output), call.S)
        if not call.training:
            self._decision = None  # with gradients, checkpointing may run the routers again in the backward

    def _reroute(self, layer: int, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Forward hook of a router: its output with the recorded ids."""
        if self._decision is None:
            return None
        if torch._C._current_graph_task_id() != -1:  # inside a backward: checkpointing's second forward
            self._in_backward = True
            if self._forwards > 1:
                raise RuntimeError(
                    "replay: expected one forward per backward with gradient checkpointing, got"
                    f" {self._forwards}; call backward after each forward, or disable checkpointing."
                )
        recorded = self._decision[layer].to(output[2].device)
        return reroute(output, recorded.long(), router.per_expert_scale)


def reroute(
    output: tuple[Tensor, Tensor, Tensor], recorded: Tensor, per_expert_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's output at other ids: (probabilities [.., E], weights [.., K], index [.., K]).

    Args:
        output: of the live router.
        recorded: [T, K] int64 ids; a row of -1 keeps the live choice.
        per_expert_scale: [E].
    """
    probabilities, weights, index = output
    recorded = recorded.view(index.shape)
    live = recorded[..., :1] < 0
    same = (recorded == index).all(-1, keepdim=True)
    ids = torch.where(live, index, recorded)
    chosen = reference.as_probabilities(probabilities).gather(-1, ids)
    total = functools.reduce(torch.add, chosen.unbind(-1))  # in the recorded order
    again = chosen / total[..., None] * per_expert_scale.to(chosen.dtype)[ids]
    return probabilities, torch.where(live | same, weights, again.to(weights.dtype)), ids


class _Records:
    """The records of a run by document, read when a document is first asked for; each token is given out once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        documents = run.documents
        self._tokens = dict(zip(documents["doc_id"].tolist(), documents["n_tokens"].tolist(), strict=True))
        self.remaining = sum(self._tokens.values())
        self._open: dict[int, Any] = {}  # doc -> [Records, consumed mask]
        self._source: Iterator[Any] | None = None

    def consume(
        self,
        doc: NDArray[np.int64],
        pos: NDArray[np.int32],
        token: NDArray[Any] | None,
        out: NDArray[np.int16],
        rows: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Write the ids of these tokens into `out` [L, T, K] at `rows`; which of them there were."""
        found = np.zeros(len(doc), bool)
        for number in np.unique(doc).tolist():
            of = np.flatnonzero(doc == number)
            records, fresh = self._document(number)
            if records is None:
                continue
            at = np.searchsorted(records.pos, pos[of])
            inside = at < len(records)
            at = np.minimum(at, len(records) - 1)
            # What was not routed in some layer cannot be routed as recorded.
            routed = (records.ids[:, at] != unrouted(self._run.num_experts)).all((0, 2))
            hit = inside & (records.pos[at] == pos[of]) & fresh[at] & routed
            of, at = of[hit], at[hit]
            if token is not None:
                other = (records.token[at] != token[of]) & (records.token[at] >= 0)
                if other.any():
                    first = int(np.flatnonzero(other)[0])
                    raise LookupError(
                        f"replay: document {number} was recorded with token id {int(records.token[at[first]])} at"
                        f" position {int(records.pos[at[first]])}, the call brings {int(token[of[first]])}; bring the"
                        " recorded documents in their order, or number them with label(doc_ids=...)."
                    )
            out[:, rows[of]] = records.ids[:, at]
            fresh[at] = False
            found[of] = True
            self.remaining -= len(of)
            if not fresh.any():
                self._open[number] = (None, None)
        return found

    def _document(self, number: int) -> tuple[Any, Any]:
        if number not in self._open and number in self._tokens:
            # Calls bring documents in their order most of the time: read on from where the last one was.
            for again in range(2):
                if self._source is None:
                    self._source = self._run.iter_documents()
                for row, records in self._source:
                    if row["doc_id"] not in self._open:
                        self._open[int(row["doc_id"])] = (records, np.ones(len(records), bool))
                    if row["doc_id"] == number:
                        break
                else:
                    self._source = None
                if number in self._open or again:
                    break
        return self._open.get(number, (None, None))
