"""How the families' texts are routed: visits per expert, effective experts, divergence between families."""

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .model import Batch


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers that hold a router and experts, in order."""
    return [module for module in model.modules() if hasattr(module, "router") and hasattr(module, "experts")]


@torch.no_grad()
def visits(model: Any, batches: list[Batch]) -> Tensor:
    """How often each expert was picked, [families, layers, E] float64 on the CPU, padding left out.

    Row i of every batch is a text of family i.
    """
    layers = decoder_layers(model)
    made: list[Tensor] = []
    hooks = [layer.router.register_forward_hook(lambda _m, _i, out: made.append(out[2])) for layer in layers]
    counts = torch.zeros(len(batches[0].ids), len(layers), layers[0].experts.num_experts, dtype=torch.float64)
    try:
        for batch in tqdm(batches, desc="routing", leave=False):
            made.clear()
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            for number, index in enumerate(made):  # [tokens, K]
                picks = index.view(*batch.ids.shape, -1)
                for family, mask in enumerate(batch.mask.bool()):
                    picked = picks[family][mask].flatten().cpu()
                    counts[family, number] += torch.bincount(picked, minlength=counts.shape[2])
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def effective(counts: Tensor) -> Tensor:
    """exp(entropy) of the share of picks; the last dimension goes."""
    share = counts / counts.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def divergence(counts: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats between the families' shares, mean over all pairs: [families, layers, E] to
    [layers]; at most ln 2."""
    share = counts / counts.sum(-1, keepdim=True)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1)

    pairs = [entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 for p, q in combinations(share, 2)]
    return torch.stack(pairs).mean(0).clamp(0, math.log(2))
