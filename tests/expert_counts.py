"""What every backend has to do with numbers of experts that no vector width and no tile divides."""

import copy

import numpy as np
import torch

import omnigene_fast
from omnigene_fast import lowbit, ops, reference

from . import gradients, helpers
from .helpers import FLOOR, assert_as_accurate, moe_layers, relative_error, tokens

COUNTS = (103, 90)  # a prime, and one that no power of two above 2 divides
K = 5


def check_gate(E: int, backend: str, device: torch.device, T: int = 33) -> None:
    """`topk_gate`, its gradient and its record, against the reference in float64."""
    generator = torch.Generator().manual_seed(E)
    logits = torch.randn(T, E, generator=generator)
    logits[0, -1], logits[1, 0] = logits.amax(dim=1)[:2] + 0.1  # the last expert is chosen, and the first
    scale, grad = 0.5 + torch.rand(E, generator=generator), torch.randn(T, K, generator=generator)
    results = []
    for dtype, run in ((torch.float32, ops.topk_gate), (torch.float64, reference.topk_gate)):
        options = {"backend": backend} if run is ops.topk_gate else {}
        place = device if run is ops.topk_gate else torch.device("cpu")
        leaves = [x.to(place, dtype).detach().clone().requires_grad_() for x in (logits, scale)]
        probabilities, weights, index = run(*leaves, top_k=K, **options)
        weights.backward(grad.to(weights))
        results.append([x.detach().cpu() for x in (probabilities, weights, index, *(leaf.grad for leaf in leaves))])
    assert torch.equal(results[0][2], results[1][2])
    assert E - 1 in results[0][2]
    for mine, exact in zip(results[0], results[1], strict=True):
        assert relative_error(mine, exact) < 4 * FLOOR, relative_error(mine, exact)


def check_experts(E: int, backend: str, device: torch.device, T: int = 33, H: int = 24, I: int = 20) -> None:  # noqa: E741
    """Output and every gradient of `expert_mlp` with LoRA; the last expert gets tokens."""
    p = gradients.problem(T, E, K, H, I, rank=3)
    p.index[0] = torch.arange(E - K, E)
    on_device = gradients.Problem(
        {name: None if x is None else x.to(device) for name, x in p.tensors.items()},
        p.index.to(device),
        p.grad.to(device),
    )
    mine = {name: x.cpu() for name, x in gradients.ours(on_device, backend=backend).items()}
    gradients.Comparison().add(mine, gradients.stock(p), gradients.truth(p)).check()


def check_8_bits(E: int, backend: str, device: torch.device, stored: str, T: int = 33) -> None:
    """Experts in 8 bits with LoRA: the output, and the gradients of what is not frozen."""
    p = gradients.problem(T, E, K, 24, 20, rank=3)
    codes, scales = {}, {}
    for name in gradients.PROJECTIONS:
        codes[name], scales[name] = lowbit.quantise(p.tensors[name], stored)
    results = []
    for run, dtype in ((ops.expert_mlp, torch.float32), (reference.expert_mlp, torch.float64)):
        ours = run is ops.expert_mlp
        place = device if ours else torch.device("cpu")
        wanted = ("hidden", "weights", *gradients.LORA)
        leaf = {name: p.tensors[name].detach().to(place, dtype, copy=True).requires_grad_() for name in wanted}
        out = run(
            leaf["hidden"],
            *(codes[name].to(place) for name in gradients.PROJECTIONS),
            p.index.to(place),
            leaf["weights"],
            activation="gelu_tanh",
            gate_up_lora=(leaf["gate_up_lhs"], leaf["gate_up_rhs"]),
            down_lora=(leaf["down_lhs"], leaf["down_rhs"]),
            gate_up_scale=scales["gate_up_proj"].to(place),
            down_scale=scales["down_proj"].to(place),
            **({"backend": backend} if ours else {}),
        )
        out.backward(p.grad.to(out))
        results.append([out.detach().cpu(), *(each.grad.cpu() for each in leaf.values())])
    for mine, exact in zip(*results, strict=True):
        assert relative_error(mine, exact) < 4 * FLOOR, relative_error(mine, exact)


def check_model(E: int, backend: str, device: torch.device) -> None:
    """A whole model: logits as accurate as transformers', and a trace that counts what the routers chose."""
    stock = helpers.gemma4(num_experts=E, top_k_experts=K)
    stock.set_experts_implementation("eager")
    model = omnigene_fast.accelerate(copy.deepcopy(stock), backend=backend).to(device)
    chosen, ids = [], tokens(2, 9)
    hooks = [
        layer.router.register_forward_hook(lambda _module, _args, out: chosen.append(out[2]))
        for layer in moe_layers(stock)
    ]
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(input_ids=ids).logits
        chosen.clear()
        expected = stock(input_ids=ids).logits
        with omnigene_fast.trace(model) as trace:
            out = model(input_ids=ids.to(device)).logits.cpu()
            counts = trace.counts.sum(axis=0)
    for hook in hooks:
        hook.remove()
    assert_as_accurate(out, expected, exact)
    np.testing.assert_array_equal(counts, [np.bincount(each.flatten(), minlength=E) for each in chosen])
