"""What a run says of the model it came from."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..integrations import gemma4, lowbit


def describe_model(model: nn.Module, routers: Mapping[int, Any]) -> dict[str, Any]:
    """Facts for meta.json: model and hash of its config, dtype, quantisation, router numerics, versions, date."""
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    config = next(iter(routers.values())).config if owner is None else owner.config
    text = json.dumps(_essence(config.to_dict()), sort_keys=True, default=str)
    quantisation = getattr(config, "quantization_config", None)
    formats = sorted({bits.format for bits in map(lowbit.bits, model.modules()) if bits is not None})
    stored = f"experts {', '.join(formats)}" if formats else None
    numerics = {gemma4.numerics_of(router) for router in routers.values()}
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(owner or model).__name__),
        "model_class": type(owner or model).__name__,
        "config_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "quantization": stored if quantisation is None else str(type(quantisation).__name__),
        "numerics": numerics.pop() if len(numerics) == 1 else "mixed",
        "order": "router: by falling probability, equal ones by rising id",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("omnigene-fast", "torch", "transformers", "pyarrow")},
    }


def shape_of_routers(routers: Mapping[int, Any]) -> tuple[list[int], int]:
    """Experts of each layer, and K.

    Raises:
        ValueError: layers that choose different numbers of experts.
    """
    top_k = {int(router.config.top_k_experts) for router in routers.values()}
    if len(top_k) > 1:
        raise ValueError(
            f"model: expected routers that all choose as many experts, got top_k_experts {sorted(top_k)} in"
            " different layers; trace models of one K."
        )
    return [int(router.proj.out_features) for router in routers.values()], top_k.pop()


_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype")


def _essence(config: Any) -> Any:
    """A config without what may change while the model stays the same: where it lies, who wrote it, switches."""
    if isinstance(config, Mapping):
        return {name: _essence(value) for name, value in config.items() if name not in _INCIDENTAL}
    return config


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """The ids that end a generated sequence."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            ids = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
            ids = module.config.get_text_config().eos_token_id if ids is None else ids
            return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def process_rank() -> int:
    """The rank of this process in torch.distributed, 0 without it."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def owns_the_decision(model: nn.Module) -> bool:
    """Whether this process writes: of the ranks that route the same tokens (tensor, expert parallelism) one does."""
    for module in model.modules():
        mesh = getattr(module, "_device_mesh", None)
        if isinstance(module, PreTrainedModel) and mesh is not None and _is_distributed():
            names = mesh.mesh_dim_names or ()
            return bool(mesh.get_local_rank("tp" if "tp" in names else 0) == 0)
    return True


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
