"""Parameters stored in 8 bits that behave as the weights which they stand for when another tool touches them.

Averaging (EMA), taking a direction out of a weight, scaling an expert, merging models: such tools read parameters, do
arithmetic and write the result back. On bare codes that gives garbage without an error. Here reading gives
float(code) * scale, and writing rounds the rows that changed anew, with a new scale; the others keep their bits.
What moves or inspects storage (device moves, dtype, data_ptr, sharding, collectives) sees the codes, as before.
"""

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import lowbit

CODES = "_omnigene_fast_codes"  # instance attribute of an experts module: name of the scale -> codes, scales

_ROUNDING = 2.0**-20  # of the largest weight of a row: 8 units in the last place of float32

_VIEWS = {
    "__getitem__", "select", "narrow", "slice", "chunk", "split", "unbind", "transpose", "permute", "swapaxes",
    "unsqueeze", "squeeze", "detach", "alias", "t",
}  # fmt: skip
_WRITING = {"__setitem__"} | {
    f"__i{name}__"
    for name in "add sub mul truediv div floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
}
_VIEW_ATTRIBUTES = {"data", "T", "mT", "H", "mH"}
_MOVES = {"to", "cpu", "cuda", "pin_memory"}
_STORAGE = {
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "untyped_storage",
    "storage", "_typed_storage", "data_ptr", "dim_order", "get_device", "type", "share_memory_", "requires_grad_",
    "detach_", "set_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "__len__",
    "__hash__", "new_empty", "new_zeros", "empty_like", "as_subclass", "record_stream", "has_names",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip


class Rounded(Tensor):
    """A view of codes: int8, or the bits of e4m3 as uint8."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on the codes or on the weights, whichever it is meant for."""
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, args, dict(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As weights."""
        with torch._C.DisableTorchFunctionSubclass():
            return weights(self).__reduce_ex__(protocol)


class Scales(Tensor):
    """The buffer of the scales, as int32.

    They are copied with the codes to which they belong and never alone, as a tool would that keeps the buffers of an
    average in step with those of the model.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, but for a copy from scales to scales."""
        if func is Tensor.copy_ and isinstance(args[0], Scales) and isinstance(args[1], Scales):
            return args[0]
        return super().__torch_function__(func, types, args, dict(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of this class."""
        with torch._C.DisableTorchFunctionSubclass():
            made = memo[id(self)] = self.clone().as_subclass(Scales)
            return made


def rows_of(scales: Tensor) -> Tensor:
    """[E, rows] float32, sharing the memory of a buffer of scales."""
    with torch._C.DisableTorchFunctionSubclass():
        return scales.view(torch.float32)


class RoundedParameter(nn.Parameter, Rounded):
    """The parameter of an experts module, whose scales are a buffer of that module."""

    __torch_function__ = Rounded.__torch_function__

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        """A plain parameter, for tools that make one of the class that they found; `bind` makes it rounded again."""
        return nn.Parameter(plain(data) if isinstance(data, Rounded) else data, requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain parameter of codes: a loaded module says what they are (`lowbit.stored`)."""
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(plain(self), requires_grad=False).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """That of the copied module; a plain parameter of weights where it is copied on its own."""
        module = self._source()[0]()
        with torch._C.DisableTorchFunctionSubclass():
            copied = module is not None and id(module) in memo
            made = nn.Parameter(plain(self).clone() if copied else weights(self), requires_grad=False)
            if copied:
                scales = copy.deepcopy(getattr(module, self._source()[1]), memo)  # the buffer of the copy, too
                bind(made, memo[id(module)], *self._source()[1:], scales)
                memo[id(module.__dict__[CODES])] = memo[id(module)].__dict__[CODES]
        memo[id(self)] = made
        return made

    def _source(self) -> tuple[Any, str, str, str]:
        source: tuple[Any, str, str, str] = self.__dict__["_omnigene_fast_source"]
        return source


def bind(parameter: Any, module: nn.Module, scale: str, dtype: str, format: str, scales: Tensor) -> None:
    """Make a parameter of codes a `RoundedParameter`; `scale` and `dtype` name buffers of `module`, one is `scales`.

    One of another class, such as a sharded or a fake tensor, stays what it is. Plain tensors of the same memory, codes
    and scales, are left in the dictionary `module._omnigene_fast_codes`: `torch.compile` does not trace this class.
    """
    codes = module.__dict__.setdefault(CODES, {})
    codes.pop(scale, None)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = RoundedParameter
        parameter.__dict__["_omnigene_fast_source"] = (weakref.ref(module), scale, dtype, format)
        codes[scale] = plain(parameter), plain(scales)


def unbind(parameter: Any) -> None:
    """Make it a plain parameter again, whose data are codes."""
    if isinstance(parameter, RoundedParameter):
        reference, scale, *_ = parameter._source()
        reference().__dict__[CODES].pop(scale)
        del parameter.__dict__["_omnigene_fast_source"]
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def plain(rounded: Any) -> Tensor:
    """The codes, or the bits of scales, sharing their memory."""
    with torch._C.DisableTorchFunctionSubclass():
        codes: Tensor = rounded.detach().as_subclass(Tensor)
        return codes


def weights(rounded: Any, dtype: torch.dtype | None = None) -> Tensor:
    """What the codes stand for, in `dtype` or else in the dtype that the model computes in."""
    scale, compute, *_ = _source_of(rounded)
    dtype = compute if dtype is None else dtype
    codes, wide = plain(rounded), torch.promote_types(dtype, torch.float32)
    codes = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    return (codes.to(wide) * scale.to(wide)).to(dtype)


def _source_of(rounded: Any) -> tuple[Tensor, torch.dtype, str, int]:
    """Scale of every element (expanded over columns), the dtype of the weights, the format, columns of a whole row."""
    own: tuple[Tensor, torch.dtype, str, int] | None = rounded.__dict__.get("_omnigene_fast_view")
    if own is not None:
        return own
    reference, scale, dtype, format = rounded._source()
    module = reference()
    rows = rows_of(getattr(module, scale))
    return rows[..., None].expand(rounded.shape), getattr(module, dtype).dtype, format, rounded.shape[-1]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.__name__
    first: Any = args[0] if args else None
    if name in ("__get__", "__set__", "__delete__"):
        attribute = func.__self__.__name__
        if name == "__set__" and attribute == "data":
            return _replace(first, args[1])
        if name == "__get__" and attribute in _VIEW_ATTRIBUTES:
            return _view(func, args, kwargs)
        return func(*args, **kwargs)
    collective = str(getattr(func, "__module__", "")).startswith("torch.distributed")
    as_bits = name == "view" and len(args) == 2 and isinstance(args[1], torch.dtype)
    if collective or as_bits or name in _STORAGE or name.startswith(("is_", "_is_")):
        return func(*args, **kwargs)
    if name in _MOVES and isinstance(first, Rounded):
        return _moved(func, first, args[1:], kwargs)
    if name == "__iter__":
        return iter(_view(Tensor.unbind, args, kwargs))
    if name in _VIEWS and isinstance(first, Rounded):
        return _view(func, args, kwargs)
    if name in ("float", "double", "half", "bfloat16") and isinstance(first, Rounded):
        return weights(first, getattr(torch, name))
    if name == "copy_" and isinstance(args[1], Rounded) and not isinstance(first, Rounded):
        return func(first, plain(args[1]) if first.dtype == args[1].dtype else weights(args[1]), *args[2:], **kwargs)
    if _writes(name):
        return _in_place(func, name, args, kwargs)
    if isinstance(kwargs.get("out"), Rounded):
        raise TypeError(f"out: expected a plain tensor, got a weight stored in {_source_of(kwargs['out'])[2]}.")
    _refuse_codes_beside(args)
    return func(*_each(args, weights), **{key: _each(value, weights) for key, value in kwargs.items()})


def _refuse_codes_beside(args: tuple[Any, ...]) -> None:
    """RuntimeError where a tool has cast its own tensor to the dtype of the codes, to compute with the weights."""
    rounded = next((one for one in args if isinstance(one, Rounded)), None)
    if rounded is not None and any(type(one) is Tensor and one.dtype == rounded.dtype for one in args):
        raise RuntimeError(
            f"weight: expected {_source_of(rounded)[1]} tensors beside weights stored in {_source_of(rounded)[2]}, got"
            f" {rounded.dtype}, the dtype of the stored bits; cast the weight first, such as by weight.float(). For the"
            ' experts of a model call model.set_experts_implementation("omnigene_fast").'
        )


def _writes(name: str) -> bool:
    return name in _WRITING if name.startswith("__") else name.endswith("_")


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to what is rounded in it."""
    if isinstance(value, Rounded):
        return change(value)
    if isinstance(value, (list, tuple)):
        made = [_each(one, change) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of rounded weights, or their values where `func` gives no view."""
    scale, *more = _source_of(args[0])
    codes = plain(args[0])
    try:
        made, scales = (func(one, *args[1:], **kwargs) for one in (codes, scale))
    except (RuntimeError, IndexError, TypeError):
        return func(weights(args[0]), *args[1:], **kwargs)  # which says what is wrong, if anything is
    if isinstance(made, (list, tuple)):
        return type(made)(_as_view(part, (rows, *more)) for part, rows in zip(made, scales, strict=True))
    if made.untyped_storage().data_ptr() != codes.untyped_storage().data_ptr():  # a copy
        return func(weights(args[0]), *args[1:], **kwargs)
    return _as_view(made, (scales, *more))


def _as_view(codes: Tensor, source: tuple[Any, ...]) -> Tensor:
    made = codes.as_subclass(Rounded)
    made.__dict__["_omnigene_fast_view"] = source
    return made


def _moved(func: Any, rounded: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Codes on another device, or weights where a floating dtype is asked for."""
    other = [one for one in (*args, *kwargs.values()) if isinstance(one, (torch.dtype, Tensor))]
    wanted = [one if isinstance(one, torch.dtype) else one.dtype for one in other]
    if any(dtype.is_floating_point for dtype in wanted):
        return func(weights(rounded, wanted[0] if isinstance(other[0], torch.dtype) else None), *args, **kwargs)
    codes = plain(rounded)
    made = func(codes, *args, **kwargs)
    if made is codes:
        return rounded
    scale, *more = _source_of(rounded)
    if scale.dim() and scale.stride(-1) == 0:
        scale = scale[..., :1].to(made.device).expand(made.shape)
    return _as_view(made, (scale.to(made.device), *more))


def _replace(parameter: Any, value: Any) -> None:
    """`parameter.data = value`: codes as they are, weights rounded."""
    if isinstance(value, Rounded):
        reference, name, *_ = parameter._source()
        mine, other = _source_of(parameter)[0], _source_of(value)[0]
        if mine.device != other.device:  # the module moves: its buffer here, not after the parameter
            moved = other[..., 0].contiguous().view(torch.int32)
            reference()._buffers[name] = moved.as_subclass(Scales)
        elif mine.data_ptr() != other.data_ptr():
            mine[..., 0].copy_(other[..., 0])
        _set(parameter, plain(value))
    elif value.dtype == parameter.dtype or not value.dtype.is_floating_point:
        _set(parameter, value)
    elif value.shape == parameter.shape:
        _write(parameter, value)
    else:
        raise ValueError(f"data: expected weights of shape {list(parameter.shape)}, got {list(value.shape)}.")


def _set(parameter: Any, codes: Tensor) -> None:
    torch.Tensor.data.__set__(parameter, codes)  # type: ignore[attr-defined]
    reference, scale, *_ = parameter._source()
    reference().__dict__[CODES][scale] = plain(parameter), plain(getattr(reference(), scale))


def _in_place(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run on the weights, then round what changed."""
    if not args:  # torch.nn.init names its arguments
        args = (kwargs.pop(next(iter(kwargs))),)
    targets = list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]]
    if name == "copy_" and not isinstance(args[1], Rounded) and args[1].dtype == targets[0].dtype:
        func(plain(targets[0]), *args[1:], **kwargs)  # codes, such as `load_state_dict` made
        return targets[0]
    changed = [weights(one, torch.float32) if isinstance(one, Rounded) else one for one in targets]
    front = changed if isinstance(args[0], (list, tuple)) else changed[0]
    out = func(front, *_each(args[1:], weights), **{key: _each(value, weights) for key, value in kwargs.items()})
    for one, value in zip(targets, changed, strict=True):
        if isinstance(one, Rounded):
            _write(one, value)
    return out if out is None or isinstance(args[0], (list, tuple)) else args[0]


@torch.no_grad()
def _write(rounded: Any, value: Tensor) -> None:
    """Round the rows of `value` that are not what is there."""
    scale, _, format, columns = _source_of(rounded)
    if rounded.dim() == 0 or rounded.shape[-1] != columns or (columns > 1 and scale.stride(-1) != 0):
        raise RuntimeError(
            f"weight: expected whole rows to be written, as a row of {format} has one scale, got a part of one; change"
            " a copy of the weights, and copy that over the parameter with copy_()."
        )
    old = weights(rounded, torch.float32)
    # Not what float32's own rounding moved: p * 0.9 + p * 0.1 is p.
    same = (old - value.to(torch.float32)).abs().amax(-1) <= _ROUNDING * old.abs().amax(-1)
    if bool(same.all()):
        return
    rows = value.detach().reshape(1, -1, value.shape[-1])
    new = lowbit.row_scales(rows, format)
    if lowbit.first_not_finite(new) is not None:
        raise ValueError(f"weight: expected finite numbers to store in {format}, got NaN or infinity.")
    made = lowbit.round_rows(rows, new, format).reshape(value.shape)
    codes = plain(rounded)
    codes.copy_(torch.where(same[..., None], codes, made if made.dtype == torch.int8 else made.view(torch.uint8)))
    scale[..., 0].copy_(torch.where(same, scale[..., 0], new.reshape(same.shape)))
