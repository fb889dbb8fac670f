"""What a model is called with: the outermost call of a transformers model, seen before and after.

A call is watched at every transformers model that holds the routers, because scripts enter at different heights: a
wrapper, the causal LM, `generate`, which calls the model inside PEFT's wrapper. The outermost one counts. Compiled
graphs see nothing of it: a module compiled as a whole is watched at its wrapper.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


@dataclass
class Call:
    """The arguments of one forward that say which tokens went through it; B rows of S tokens."""

    B: int
    S: int
    token: Tensor | None  # [B, S], None if the model was called with embeddings
    mask: Any  # as it was passed: None, [B, >= S], [B, 1, S, >= S], or a dict of those by kind of attention
    position: Tensor | None  # [B or 1, S]
    past: int  # cached tokens before these
    cache: Any
    training: bool
    inputs: Mapping[str, Any]
    generation: Any = None  # the state of the `generate` that makes this call, if one does

    @property
    def rows(self) -> int:
        """Tokens, padding included: the T of the routers."""
        return self.B * self.S


class Watch:
    """Calls `begin(call)` before and `end(call, output)` after each outermost forward; output is None if it failed."""

    def __init__(
        self,
        model: nn.Module,
        routers: list[nn.Module],
        begin: Callable[[Call], None],
        end: Callable[[Call, Any], None],
        generation: Callable[[], Any],
        generated: Callable[[], None] = lambda: None,
    ) -> None:
        """See the class; `generation()` makes the state of a `generate` that begins, `generated()` follows its end."""
        self._begin, self._end = begin, end
        self._new_generation, self._generated = generation, generated
        self._generation: Any = None  # of the `generate` that runs
        self._depth = 0
        self._call: Call | None = None
        self._undo: list[Callable[[], None]] = []
        self._open: Any = None  # the module whose call is under way
        held = {id(router) for router in routers}
        entrances = [module for module in model.modules() if self._is_entrance(module, held)]
        self._entrances = {id(module): _parameter_names(module) for module in entrances}
        if not entrances:
            raise ValueError(
                f"model: expected a transformers model, or a wrapper of one, got a {type(model).__name__} that holds"
                " routers alone."
            )
        for module in entrances:
            self._undo.append(functools.partial(_unwatch, module, self))
            _watch(module, self)
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is not None:  # module.compile()
                self._replace(module, "_compiled_call_impl", self._watched(compiled, module))
            if hasattr(type(module), "get_compiled_call"):  # `generate` decodes with it if the cache has a fixed size
                # A partial, so that in a copy of the model it is bound to the copy.
                getter = functools.partial(self._get_compiled_call, module)
                self._replace(module, "get_compiled_call", getter)
            usual: Any = getattr(type(module), "generate", None)
            if usual is not None:
                generate = functools.partial(self._generate, module, module.__dict__.get("generate"))
                self._replace(module, "generate", functools.update_wrapper(generate, usual))

    def __deepcopy__(self, memo: Any) -> "Watch":
        return self  # the hooks of a copy of the model come here too, and are not answered

    def remove(self) -> None:
        """Leave the model as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    @staticmethod
    def _is_entrance(module: nn.Module, held: set[int]) -> bool:
        if not isinstance(module, PreTrainedModel) and not hasattr(module, "_orig_mod"):
            return False
        return held <= {id(inner) for inner in module.modules()}

    def _replace(self, module: Any, name: str, value: Any) -> None:
        """Put `value` into the instance's attribute `name` until `remove`."""
        before = module.__dict__.get(name)
        module.__dict__[name] = value

        def undo() -> None:
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

        self._undo.append(undo)

    def _get_compiled_call(self, module: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._watched(type(module).get_compiled_call(module, *args, **kwargs), module)

    def _generate(self, module: Any, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """`generate` of `module`, or the instance's `own` one; the outermost marks the calls that it makes."""
        generate = functools.partial(type(module).generate, module) if own is None else own
        if self._generation is not None or id(module) not in self._entrances:
            return generate(*args, **kwargs)
        self._generation = self._new_generation()
        try:
            return generate(*args, **kwargs)
        finally:
            self._generation = None
            self._generated()

    def _watched(self, compiled: Callable[..., Any], module: Any) -> Callable[..., Any]:
        """`compiled`, a call of `module` whose hooks are compiled away, with what the hooks would have done."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(module, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                self._after(module, args, kwargs, output)
            return output

        return call

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in self._entrances:
            return
        if module is self._open:  # an interrupt ended its last call, and torch called no hook then
            call, self._depth, self._call = self._call, 0, None
            assert call is not None
            self._end(call, None)
        self._depth += 1
        if self._depth == 1:
            self._open = module
            try:
                self._call = describe(module, dict(zip(self._entrances[id(module)], args, strict=False)) | kwargs)
                self._call.generation = self._generation
                self._begin(self._call)
            except BaseException:
                self._depth, self._call, self._open = 0, None, None
                raise

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not self._depth or id(module) not in self._entrances:
            return
        self._depth -= 1
        if self._depth == 0:
            call, self._call, self._open = self._call, None, None
            assert call is not None
            self._end(call, output)


# Instance attribute of a module: the watches of its calls. A compiled graph depends on the hooks that it finds and on
# their numbers, and is compiled again for others: so all watches share two hooks that are always the same.
_WATCHES = "_omnigene_fast_watches"
_HOOK = -1  # torch counts its own from 0


def put_hook(module: Any, hook: Callable[..., Any], *, first: bool = False) -> None:
    """Register a forward hook under a number that is the same each time; `first`: before those that are there."""
    module._forward_hooks[_HOOK] = hook
    if first:
        module._forward_hooks.move_to_end(_HOOK, last=False)


def take_hook(module: Any) -> None:
    """Remove what `put_hook` registered."""
    module._forward_hooks.pop(_HOOK, None)


def _watch(module: Any, watch: Watch) -> None:
    module.__dict__.setdefault(_WATCHES, []).append(watch)
    module._forward_pre_hooks[_HOOK], module._forward_pre_hooks_with_kwargs[_HOOK] = _before_call, True
    put_hook(module, _after_call)
    module._forward_hooks_with_kwargs[_HOOK] = module._forward_hooks_always_called[_HOOK] = True


def _unwatch(module: Any, watch: Watch) -> None:
    watches = module.__dict__.get(_WATCHES, [])
    if watch in watches:
        watches.remove(watch)
    if watches:
        return
    module.__dict__.pop(_WATCHES, None)
    take_hook(module)
    for table in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        getattr(module, table).pop(_HOOK, None)
    for table in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(module, table).pop(_HOOK, None)


def _before_call(module: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for watch in list(module.__dict__.get(_WATCHES, ())):
            watch._before(module, args, kwargs)


def _after_call(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for watch in list(module.__dict__.get(_WATCHES, ())):
            watch._after(module, args, kwargs, output)


def _parameter_names(module: Any) -> list[str]:
    # A wrapper's own parameters may be *args: what it hands on is the model's.
    model = next((inner for inner in module.modules() if isinstance(inner, PreTrainedModel)), module)
    return [name for name in inspect.signature(type(model).forward).parameters if name != "self"]


def describe(module: Any, inputs: dict[str, Any]) -> Call:
    """The call that `module` is about to run; ValueError if it has neither token ids nor embeddings."""
    token, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    like = token if token is not None else embeds
    if not isinstance(like, Tensor) or like.dim() < 2:
        raise ValueError(
            "trace: expected the model to be called with input_ids [B, S] or inputs_embeds [B, S, H],"
            f" got {type(like).__name__}."
        )
    cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    return Call(
        B=like.shape[0],
        S=like.shape[1],
        token=token,
        mask=inputs.get("attention_mask"),
        position=inputs.get("position_ids"),
        past=0 if cache is None else cached_tokens(cache),
        cache=cache,
        training=getattr(module, "_orig_mod", module).training and torch.is_grad_enabled(),
        inputs=inputs,
    )


def cached_tokens(cache: Any) -> int:
    """How many tokens a transformers cache holds, without stopping a GPU's stream where the cache allows that."""
    for layer in getattr(cache, "layers", ()):
        # A static layer counts on the device; its sliding kind also counts on the host.
        length = getattr(layer, "cumulative_length_int", None)
        if isinstance(length, int):
            return length
    return int(cache.get_seq_length())


def valid_tokens(call: Call) -> Tensor | None:
    """Which tokens of `call` are no padding, [B, S] bool on the mask's device; None for all.

    Raises:
        ValueError: a mask of a kind that cannot be read.
    """
    mask = call.mask
    if isinstance(mask, Mapping):
        masks = [each for kind, each in mask.items() if kind == "full_attention"] or list(mask.values())
        mask = masks[0] if masks else None
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == call.B and mask.shape[1] >= call.S:
        # As transformers reads it: by position in the cache, which may be longer than what is in it.
        start = call.past if mask.shape[1] >= call.past + call.S else mask.shape[1] - call.S
        return mask[:, start : start + call.S].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= call.past + call.S:
        # A token that may not look at itself is padding.
        own = mask[:, 0, :, call.past : call.past + call.S].diagonal(dim1=-2, dim2=-1)
        own = own if own.dtype == torch.bool else own == 0
        return own.expand(call.B, call.S)
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask: expected [B, S] = [{call.B}, {call.S}] or more columns, or [B, 1, S, cached + S], got"
        f" {shape}; pass mask= to say which tokens count."
    )


def cached_valid(call: Call) -> Tensor | None:
    """How many of the cached tokens of each row are no padding, [B] on the mask's device; None if no mask tells."""
    mask = call.mask
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != call.B or mask.shape[1] < call.past + call.S:
        return None
    return mask[:, : call.past].bool().sum(1)


def cache_of(call: Call, output: Any) -> Any:
    """The cache that a call went on with or that the model made in it; None if there is none."""
    given = {name: getattr(output, name, None) for name in CACHE_NAMES}
    if isinstance(output, Mapping):
        given |= {name: output.get(name) for name in CACHE_NAMES}
    return next((cache for cache in (call.cache, *given.values()) if cache is not None), None)


@dataclass
class Place:
    """Where a call goes on: the state of its sequences, and what became of them since their last call."""

    stream: Any
    source: list[int] | None = None  # row b continues what was row source[b]; None: every row itself
    branches: bool = False  # the cached tokens are not those that the last call left: cropped, copied or unknown


@dataclass
class _Followed:
    stream: Any
    columns: int  # cached tokens after the last call
    keys: Tensor | None
    generation: Any


class Streams:
    """Which cached sequences a call continues: per cache object, whatever `new` makes."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self._new = new
        self._by_cache: weakref.WeakKeyDictionary[Any, _Followed] = weakref.WeakKeyDictionary()

    def of(self, call: Call) -> Place:
        """The state of the sequences that `call` continues, or a new one."""
        known = self._by_cache.get(call.cache) if call.past and call.cache is not None else None
        if known is None:
            return Place(self._new(), branches=bool(call.past))
        if known.generation is not None and known.generation is call.generation:
            return Place(known.stream)  # `generate` reorders its own beams and takes back its own candidates
        if known.columns != call.past:
            return Place(known.stream, branches=True)
        keys = _keys(call.cache)
        if keys is None or known.keys is None or keys is known.keys:
            return Place(known.stream)
        source = _rows(known.keys, keys, call.past)
        return Place(known.stream, source, branches=source is None)

    def follow(self, stream: Any, call: Call, cache: Any, fed: int) -> None:
        """Remember that `cache` holds, after `call`, `fed` tokens of it for each row."""
        if cache is not None:
            self._by_cache[cache] = _Followed(stream, call.past + fed, _keys(cache), call.generation)


def _keys(cache: Any) -> Tensor | None:
    """The keys [B, heads, columns, D] of the last layer that has its own, which depend on all tokens before.

    Whatever changes the rows of a cache between two calls puts other tensors there.
    """
    found = (getattr(layer, "keys", None) for layer in reversed(getattr(cache, "layers", ())))
    return next((keys for keys in found if isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel()), None)


def _rows(before: Tensor, after: Tensor, past: int) -> list[int] | None:
    """Which row of `before` each row of `after` was, by their latest columns; None if there is one that was none."""
    if before.shape[1] != after.shape[1] or before.shape[3] != after.shape[3]:
        return None
    ends = [min(past, keys.shape[2]) for keys in (before, after)]
    width = min(8, *ends)
    old, new = (
        keys[:, :, end - width : end].detach().to("cpu").flatten(1)
        for keys, end in zip((before, after), ends, strict=True)
    )
    equal = (new[:, None] == old[None]).all(-1)  # [B after, B before]
    source: list[int] = []
    for row, matches in enumerate(equal.tolist()):
        candidates = [at for at, match in enumerate(matches) if match]
        if not candidates:
            return None
        unused = [at for at in candidates if at not in source]
        source.append(row if row in candidates else (unused or candidates)[0])
    return source
