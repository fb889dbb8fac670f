"""What other tools do with an accelerated model: hooks, exporters, dissection, quantisation."""

import contextlib
import copy
import io
import logging

import numpy as np
import pytest
import torch
from torch import nn

import omnigene_fast
from omnigene_fast import accelerate, restore
from omnigene_fast.integrations import experts as experts_module
from omnigene_fast.integrations import gemma4 as router_module

from . import helpers
from .helpers import EXPERTS, TOP_K, assert_as_accurate, moe_layers, relative_error, tokens


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


# --- hooks ------------------------------------------------------------------------------------------------------------

ROUTER_OUTPUTS = {
    "nothing": lambda out: None,
    "a list": list,
    "a copy": lambda out: tuple(each.clone() for each in out),
    "weights in place": lambda out: (out[1].mul_(slope(out[1])), None)[1],
    "ids in place": lambda out: (out[2].copy_(out[2].flip(0)), None)[1],
    "bfloat16 weights": lambda out: (out[0], out[1].bfloat16(), out[2]),
    "float64 weights": lambda out: (out[0], out[1].double(), out[2]),
    "integer weights": lambda out: (out[0], (4 * out[1]).long(), out[2]),
    "boolean weights": lambda out: (out[0], out[1] > 0.2, out[2]),
    "detached weights": lambda out: (out[0], out[1].detach().requires_grad_(), out[2]),
    "zero weights": lambda out: (out[0], 0 * out[1], out[2]),
    "int32 ids": lambda out: (out[0], out[1], out[2].int()),
    "int16 ids": lambda out: (out[0], out[1], out[2].short()),
    "uint8 ids": lambda out: (out[0], out[1], out[2].to(torch.uint8)),
    "uint16 ids": lambda out: (out[0], out[1], out[2].to(torch.uint16)),
    "one expert less": lambda out: (out[0], out[1][:, :-1], out[2][:, :-1]),
    "one expert more": lambda out: (out[0], *(torch.cat([each, each[:, :1]], dim=1) for each in out[1:])),
    "one expert again and again": lambda out: (out[0], out[1], torch.ones_like(out[2])),
    "columns": lambda out: (out[0], out[1].t().contiguous().t(), out[2].t().contiguous().t()),
    "one row for all": lambda out: (out[0], out[1][:1].expand_as(out[1]), out[2][:1].expand_as(out[2])),
    "no probabilities": lambda out: (None, *out[1:]),
    "bfloat16 probabilities": lambda out: (out[0].bfloat16(), *out[1:]),
}
# On stock these leave the logits as they are, to rounding.
SAME = (
    *("nothing", "a list", "a copy", "float64 weights", "detached weights", "columns", "no probabilities"),
    *("int32 ids", "int16 ids", "uint8 ids", "uint16 ids", "bfloat16 probabilities"),
)


def slope(tensor):
    """0.5 to 1.5 along the last dimension: unlike a constant, no norm takes it out again."""
    return torch.linspace(0.5, 1.5, tensor.shape[-1])


def hooked(model, module, hook, *, traced=False, **options):
    """Logits, and what a trace counted, with `hook` on one module of the middle layer."""
    handle = moe_layers(model)[1].get_submodule(module).register_forward_hook(hook, **options)
    try:
        with omnigene_fast.trace(model) if traced else contextlib.nullcontext() as trace:
            out = logits(model)
            return out, trace.counts if traced else None
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ROUTER_OUTPUTS)
def test_a_routers_hook_returns_what_it_may_on_stock(kind):
    def hook(module, args, out):
        return ROUTER_OUTPUTS[kind](out)

    stock = helpers.gemma4()
    fast = accelerate(copy.deepcopy(stock))
    expected, _ = hooked(stock, "router", hook)
    assert (relative_error(expected, logits(stock)) > 1e-5) == (kind not in SAME)  # the hook has its say, on stock
    counts = []
    for model, traced in ((fast, False), (fast, True), (stock, True)):
        out, counted = hooked(model, "router", hook, traced=traced)
        assert relative_error(out, expected) < 1e-5
        counts += [counted] if traced else []
    # A trace records the decision of the router itself, wherever it runs.
    np.testing.assert_array_equal(counts[0][:, :2], counts[1][:, :2])
    assert counts[0][:, 1].sum() == tokens().numel() * TOP_K


@pytest.mark.parametrize("kind", ["of float", "that no expert has", "negative"])
def test_a_routers_hook_may_not_return_ids(kind):
    """On stock, eager and grouped_mm differ on them, and grouped_mm reads memory that nobody wrote."""

    def hook(module, args, out):
        ids = {"of float": out[2].float(), "that no expert has": out[2] + EXPERTS, "negative": out[2] - EXPERTS}[kind]
        return out[0], out[1], ids

    with pytest.raises((IndexError, TypeError), match="index: expected"):
        hooked(accelerate(helpers.gemma4()), "router", hook)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("module", ["experts", "router.proj", "router.norm", "router"])
@pytest.mark.parametrize("form", ["changed", "nothing", "with kwargs", "before", "before, with kwargs", "always"])
def test_hooks_around_the_router_equal_stock(module, form, traced):
    def change(value):
        if isinstance(value, tuple):
            return (value[0], slope(value[1]) * value[1], value[2])
        return slope(value) * value

    def run(model):
        where, seen = moe_layers(model)[1].get_submodule(module), []

        def after(module, args, *rest):
            seen.append(len(rest))
            return None if form == "nothing" else change(rest[-1])

        def before(module, args, kwargs=None):
            seen.append(0)
            args = (change(args[0]), *args[1:])
            return args if kwargs is None else (args, kwargs)

        if form.startswith("before"):
            handle = where.register_forward_pre_hook(before, with_kwargs="kwargs" in form)
        else:
            handle = where.register_forward_hook(after, with_kwargs="kwargs" in form, always_call=form == "always")
        try:
            with omnigene_fast.trace(model) if traced else contextlib.nullcontext():
                return logits(model), seen
        finally:
            handle.remove()

    stock = helpers.gemma4()
    expected, called = run(stock)
    assert (relative_error(expected, logits(stock)) > 1e-4) == (form != "nothing")
    out, ours = run(accelerate(copy.deepcopy(stock)))
    assert relative_error(out, expected) < 1e-5
    assert ours == called
    assert len(called) == 1


# --- exporters --------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Token ids to logits, which is what exporters take."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_the_operators(strict):
    model = accelerate(helpers.gemma4())
    program = torch.export.export(Logits(model), (tokens(),), strict=strict)
    assert any("omnigene_fast.expert_mlp_fwd" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = tokens().flip(1)
    out = torch.export.load(file).module()(other)
    assert relative_error(out, model(input_ids=other).logits) < 1e-5


@torch.no_grad()
def test_jit_trace_keeps_the_operators():
    model = accelerate(helpers.gemma4())
    program = torch.jit.trace(Logits(model), (tokens(),), check_trace=False)
    other = tokens().flip(1)
    assert relative_error(program(other), logits_of(model, other)) < 1e-6
    assert "omnigene_fast::" in str(program.inlined_graph)


def logits_of(model, ids):
    return model(input_ids=ids).logits


# --- dissection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["stock", "accelerated"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_routers_only_leaves_the_experts_to_transformers(implementation, before, monkeypatch):
    stock = helpers.gemma4()
    stock.set_experts_implementation(implementation)
    expected = logits(stock)
    model = copy.deepcopy(stock)
    if before == "accelerated":
        accelerate(model)
    assert accelerate(model, routers_only=True) is model
    assert model.config._experts_implementation == implementation
    for layer in moe_layers(model):
        assert router_module.is_accelerated(layer.router)
        assert layer.experts.config._experts_implementation == implementation
        assert experts_module.RECORD not in layer.experts.__dict__
    monkeypatch.setattr(omnigene_fast.ops, "expert_mlp", lambda *_, **__: pytest.fail("the experts are ours"))
    assert relative_error(logits(model), expected) < 1e-5
    with omnigene_fast.trace(model) as trace:
        logits(model)
        assert trace.counts.sum() == tokens().numel() * len(moe_layers(model)) * TOP_K
    restore(model)
    assert [sorted(module.__dict__) for module in model.modules()] == [
        sorted(each.__dict__) for each in stock.modules()
    ]
    assert torch.equal(logits(model), expected)


def test_routers_only_and_back():
    model = accelerate(accelerate(helpers.gemma4(), routers_only=True))
    assert model.config._experts_implementation == experts_module.NAME
    assert restore(model).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("made", ["with experts_dtype", "with experts in 8 bits", "without routers"])
def test_routers_only_refuses(made):
    model, options = helpers.gemma4(), {}
    if made == "with experts_dtype":
        options = {"experts_dtype": "int8"}
    elif made == "with experts in 8 bits":
        accelerate(model, experts_dtype="int8")
    else:
        model = moe_layers(model)[0].experts
    with pytest.raises(ValueError, match="routers_only: expected"):
        accelerate(model, routers_only=True, **options)


# --- quantised projections --------------------------------------------------------------------------------------------


class FourBits(nn.Linear):
    """A projection whose weight is packed bytes, as bitsandbytes keeps it."""

    def __init__(self, inner):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.bias, self.inner = None, inner
        self.weight = nn.Parameter(torch.zeros(inner.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("routers_only", [False, True])
@pytest.mark.parametrize("quantised", [True, False])
def test_a_quantised_projection_is_named_once(quantised, routers_only, caplog):
    router_module._say_that_it_is_quantised.cache_clear()
    stock = helpers.gemma4()
    stock.set_experts_implementation("eager")
    if quantised:
        for layer in moe_layers(stock):
            layer.router.proj = FourBits(layer.router.proj)
    with caplog.at_level(logging.WARNING, logger="omnigene_fast"):
        for _ in range(2):
            model = accelerate(copy.deepcopy(stock), routers_only=routers_only)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == int(quantised)
    assert all('llm_int8_skip_modules=["router.proj", "lm_head"]' in each and "FourBits" in each for each in said)
    assert_as_accurate(logits(model), logits(stock), logits(copy.deepcopy(stock).double()))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_projections_are_named_before_they_move(kind, caplog):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    router_module._say_that_it_is_quantised.cache_clear()
    model = helpers.gemma4()
    proj = moe_layers(model)[0].router.proj
    moe_layers(model)[0].router.proj = getattr(bitsandbytes.nn, kind)(proj.in_features, proj.out_features, bias=False)
    accelerate(model)
    assert kind in caplog.text
