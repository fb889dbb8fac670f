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
    ) -> None:
        self._begin, self._end = begin, end
        self._depth = 0
        self._call: Call | None = None
        self._undo: list[Callable[[], None]] = []
        self._open: Any = None  # the module whose call is under way
        held = {id(router) for router in routers}
        entrances = [module for module in model.modules() if self._is_entrance(module, held)]
        self._entrances = {id(module) for module in entrances}
        if not entrances:
            raise ValueError(
                f"model: expected a transformers model, or a wrapper of one, got a {type(model).__name__} that holds"
                " routers alone."
            )
        for module in entrances:
            names = _parameter_names(module)
            before = functools.partial(self._before, names)
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove)
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is not None:  # module.compile()
                self._replace(module, "_compiled_call_impl", self._watched(compiled, module, names))
            if hasattr(type(module), "get_compiled_call"):  # `generate` decodes with it if the cache has a fixed size
                # A partial, so that in a copy of the model it is bound to the copy.
                getter = functools.partial(self._get_compiled_call, module, names)
                self._replace(module, "get_compiled_call", getter)

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

    def _get_compiled_call(self, module: Any, names: list[str], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._watched(type(module).get_compiled_call(module, *args, **kwargs), module, names)

    def _watched(self, compiled: Callable[..., Any], module: Any, names: list[str]) -> Callable[..., Any]:
        """`compiled`, a call of `module` whose hooks are compiled away, with what the hooks would have done."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(names, module, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                self._after(module, args, kwargs, output)
            return output

        return call

    def _before(self, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or id(module) not in self._entrances:
            return
        if module is self._open:  # an interrupt ended its last call, and torch called no hook then
            call, self._depth, self._call = self._call, 0, None
            assert call is not None
            self._end(call, None)
        self._depth += 1
        if self._depth == 1:
            self._open = module
            try:
                self._call = describe(module, dict(zip(names, args, strict=False)) | kwargs)
                self._begin(self._call)
            except BaseException:
                self._depth, self._call, self._open = 0, None, None
                raise

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._depth or id(module) not in self._entrances:
            return
        self._depth -= 1
        if self._depth == 0:
            call, self._call, self._open = self._call, None, None
            assert call is not None
            self._end(call, output)


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


class Streams:
    """Which cached sequences a call continues: per cache object, whatever `new` makes."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self._new = new
        self._by_cache: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def of(self, call: Call) -> Any:
        """The state of the sequences that `call` continues, or a new one."""
        if call.past and call.cache is not None and call.cache in self._by_cache:
            return self._by_cache[call.cache]
        stream = self._new()
        if call.cache is not None:
            self._by_cache[call.cache] = stream
        return stream

    def follow(self, stream: Any, output: Any) -> None:
        """Remember the cache that the model made in a call without one."""
        for name in CACHE_NAMES:
            cache = getattr(output, name, None)
            if cache is None and isinstance(output, Mapping):
                cache = output.get(name)
            if cache is not None:
                self._by_cache[cache] = stream
                return
