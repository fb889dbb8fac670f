"""How often each expert was picked: the sum that every measure begins with."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def count_picks(ids: NDArray[Any], slot: NDArray[np.int64], slots: int, num_experts: int) -> NDArray[np.int32]:
    """Picks per slot, layer and expert: in C++, which lets other threads run, or in numpy where it was not built.

    Args:
        ids: [L, n, K] uint8 or uint16 expert ids, all < `num_experts`, or `records.unrouted`, which counts for none.
        slot: [n] which row of the result a token counts for, in [0, slots).
        slots: D, rows of the result.
        num_experts: E.

    Returns:
        [D, L, E] int32.

    Raises:
        ValueError: an id that is no expert, such as that of an unused slot; a slot out of range.
    """
    layers, n, K = ids.shape
    out = np.zeros((slots, layers, num_experts), np.int32)
    slot = np.ascontiguousarray(slot, np.int64)
    if slot.shape != (n,) or (n and not (slot.min() >= 0 and slot.max() < slots)):
        raise ValueError(f"slot: expected {n} numbers in [0, {slots}), got shape {list(slot.shape)}.")
    try:
        module = importlib.import_module("omnigene_fast._cpu")
    except ImportError:
        return _count_in_numpy(ids, slot, out)
    ids = np.ascontiguousarray(ids)
    if out.size:
        module.count_layers(ids.ctypes.data, ids.itemsize, slot.ctypes.data, layers, n, K, num_experts, out.ctypes.data)
    return out


def _count_in_numpy(ids: NDArray[Any], slot: NDArray[np.int64], out: NDArray[np.int32]) -> NDArray[np.int32]:
    slots, _, num_experts = out.shape
    for layer, picks in enumerate(ids):
        chosen = picks != np.iinfo(ids.dtype).max - 1
        experts = picks[chosen]
        if experts.size and int(experts.max()) >= num_experts:
            raise ValueError(f"ids: expected expert ids in [0, {num_experts}), got {int(experts.max())}.")
        flat = np.broadcast_to(slot[:, None], picks.shape)[chosen] * num_experts + experts
        out[:, layer] = np.bincount(flat, minlength=slots * num_experts).reshape(slots, num_experts)
    return out
