"""`accelerate`, `restore` and the experts implementation on tiny models, against stock transformers."""

import copy
import inspect
import io
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextExperts, Gemma4TextRouter

import omnigene_fast
from omnigene_fast import ops
from omnigene_fast.integrations import experts as experts_module
from omnigene_fast.integrations import gemma4 as router_module

from . import helpers
from .helpers import EXPERTS, HIDDEN, TOP_K, assert_as_accurate, moe_layers, relative_error, tokens

accelerate, restore = omnigene_fast.accelerate, omnigene_fast.restore


@pytest.fixture
def calls(monkeypatch):
    """Counts of the calls that reach each operator."""
    counts = dict.fromkeys(("route", "topk_gate", "expert_mlp"), 0)
    for name in counts:
        original = getattr(ops, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    return counts


@torch.no_grad()
def logits(model, **inputs):
    return model(**({"input_ids": tokens()} | inputs)).logits


def accelerated(model, **options):
    return accelerate(copy.deepcopy(model), **options)


def snapshot(model):
    """Everything that `restore` has to bring back, by module: class, attributes, hooks, parameters, implementation."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            [id(parameter) for parameter in module._parameters.values()],
            list(module._modules),
            list(module._forward_hooks.values()),
            getattr(getattr(module, "config", None), "_experts_implementation", None),
        )
        for name, module in model.named_modules()
    }


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_as_accurate_as_stock(dtype, seed, calls):
    stock = helpers.gemma4(dtype, seed=seed)
    stock.set_experts_implementation("eager")
    exact = logits(copy.deepcopy(stock).double())
    assert_as_accurate(logits(accelerated(stock)), logits(stock), exact)
    assert calls == {"route": 3, "topk_gate": 0, "expert_mlp": 3}


@pytest.mark.parametrize("mistake", ["activation", "eps", "scale"])
def test_logits_parity_rejects(mistake):
    """The comparison above must see one wrong detail in one layer."""
    stock = helpers.gemma4()
    stock.set_experts_implementation("eager")
    wrong = accelerated(stock)
    layer = moe_layers(wrong)[1]
    if mistake == "activation":
        layer.experts.act_fn = nn.SiLU()
    elif mistake == "eps":
        layer.router.norm.eps = 1e-2
    else:
        layer.router.scale.data.fill_(1)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_accurate(logits(wrong), logits(stock), logits(copy.deepcopy(stock).double()))


def test_numerics_and_backend_reach_the_operators(monkeypatch):
    routes, experts = [], []
    monkeypatch.setattr(ops, "route", _recording(ops.route, routes))
    monkeypatch.setattr(ops, "expert_mlp", _recording(ops.expert_mlp, experts))
    model = accelerate(helpers.gemma4(torch.bfloat16), numerics="fp32", backend="reference")
    fp32 = logits(model)
    hf = logits(accelerate(model, backend="reference"))  # a second call updates the options
    assert [kwargs["numerics"] for kwargs in routes] == ["fp32"] * 3 + ["hf"] * 3
    logits(accelerate(model, save="input"))
    for seen in (routes, experts):
        assert [kwargs["backend"] for kwargs in seen] == ["reference"] * 6 + ["auto"] * 3
    assert [kwargs["save"] for kwargs in experts] == ["preactivation"] * 6 + ["input"] * 3
    assert not torch.equal(hf, fp32)


def _recording(function, seen):
    def recorded(*args, **kwargs):
        seen.append(kwargs)
        return function(*args, **kwargs)

    return recorded


def test_generate_greedy_equals_stock(calls):
    stock = helpers.gemma4()
    options = {"input_ids": tokens(2, 8), "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    options["no_repeat_ngram_size"] = 2  # or a tiny random model repeats one token
    expected = stock.generate(**options)
    out = accelerated(stock).generate(**options)
    assert torch.equal(out, expected)
    assert out.shape == (2, 72)
    assert len(set(out[0, 8:].tolist())) > 4, "a degenerate sequence compares nothing"
    assert calls["expert_mlp"] == calls["route"] == 3 * 64


def test_router_logits_and_hooks_equal_stock():
    stock = helpers.gemma4()
    ours = accelerated(stock)
    recorded = {"stock": [], "ours": []}
    for name, model in (("stock", stock), ("ours", ours)):
        for layer in moe_layers(model):
            layer.router.register_forward_hook(lambda module, args, out, name=name: recorded[name].append(out))
    with torch.no_grad():
        expected, out = (model(tokens(), output_router_logits=True) for model in (stock, ours))
    if hasattr(expected, "router_logits"):  # transformers 5.17 has the option on no Gemma-4 output
        expected, out = expected.router_logits, out.router_logits
    else:
        expected, out = ([out[0] for out in recorded[name]] for name in ("stock", "ours"))
    assert len(out) == len(expected) == 3
    for mine, same in zip(out, expected, strict=True):
        assert mine.dtype == same.dtype == torch.float32
        assert relative_error(mine, same) < 1e-6
    assert len(recorded["ours"]) == len(recorded["stock"]) == 3
    for (mine, weights, index), (same, stock_weights, stock_index) in zip(*recorded.values(), strict=True):
        assert relative_error(mine, same) < 1e-6
        assert torch.equal(index, stock_index)
        assert index.dtype == torch.int64
        assert relative_error(weights, stock_weights) < 1e-6


def test_router_pre_hooks_may_change_its_input():
    model = accelerate(helpers.gemma4())
    before = logits(model)
    moe_layers(model)[0].router.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),))
    assert not torch.allclose(logits(model), before)


def test_router_takes_leading_dimensions_as_stock_does():
    stock = moe_layers(helpers.gemma4())[0]
    ours = accelerate(copy.deepcopy(stock))
    hidden = torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        for mine, same in zip(ours.router(hidden), stock.router(hidden), strict=True):
            assert mine.shape == same.shape
            assert relative_error(mine, same) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_equals_eager(backend):
    model = accelerate(helpers.gemma4())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative_error(logits(compiled), logits(model)) < 1e-6
    assert "omnigene_fast" in model.config._experts_implementation


def test_accelerating_a_compiled_model_takes_effect(calls):
    stock = helpers.gemma4()
    compiled = torch.compile(stock, backend="eager")
    expected = logits(compiled)
    assert accelerate(compiled) is compiled
    assert relative_error(logits(compiled), expected) < 1e-5
    assert "forward" in moe_layers(stock)[0].router.__dict__
    restore(compiled)
    assert "forward" not in moe_layers(stock)[0].router.__dict__
    assert torch.equal(logits(compiled), expected)


def test_gradients_equal_stock():
    stock = helpers.gemma4()
    ours = accelerated(stock)
    out, expected = (model(tokens(), labels=tokens()) for model in (ours, stock))
    assert relative_error(out.logits.detach(), expected.logits.detach()) < 1e-5
    out.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-4, name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_forward():
    stock = helpers.gemma4()
    ours = accelerated(stock)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()
    assert relative_error(ours(tokens()).logits.detach(), logits(stock)) < 1e-5


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights, calls):
    stock = helpers.gemma4(weights)
    stock.set_experts_implementation("eager")
    exact = logits(copy.deepcopy(stock).double())
    ours = accelerated(stock)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = logits(ours), logits(stock)
    assert out.dtype == expected.dtype
    assert_as_accurate(out, expected, exact)
    assert calls == {"route": 0, "topk_gate": 3, "expert_mlp": 3}  # the projection is autocast's business


def test_experts_take_float32_activations_with_bf16_weights():
    """What autocast hands them behind a norm."""
    layer = moe_layers(accelerate(helpers.gemma4(torch.bfloat16)))[0]
    hidden = torch.randn(9, HIDDEN)
    index, weights = helpers.routing("uniform", 9, TOP_K, EXPERTS, seed=0)
    with torch.no_grad():
        out = layer.experts(hidden, index, weights)
        low = layer.experts(hidden.bfloat16(), index, weights)
    assert out.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert torch.equal(out, low.float())


# --- model families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "model", "language_model"])
def test_conditional_generation(part, calls):
    stock = helpers.gemma4_conditional()
    expected = logits(stock)
    ours = copy.deepcopy(stock)
    inner = {"whole": ours, "model": ours.model, "language_model": ours.model.language_model}[part]
    before = snapshot(ours)
    accelerate(inner)
    assert relative_error(logits(ours), expected) < 1e-5
    assert calls == {"route": 3, "topk_gate": 0, "expert_mlp": 3}
    assert ours.model.language_model.config._experts_implementation == "omnigene_fast"
    assert ours.config.vision_config._experts_implementation == stock.config.vision_config._experts_implementation
    restore(inner)
    assert snapshot(ours) == before


def test_per_layer_inputs(calls):
    stock = helpers.gemma4(hidden_size_per_layer_input=8)
    assert relative_error(logits(accelerated(stock)), logits(stock)) < 1e-5
    assert calls["expert_mlp"] == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_other_families_get_the_experts_only(family, calls):
    stock = getattr(helpers, family)()
    stock.set_experts_implementation("eager")
    exact = logits(copy.deepcopy(stock).double())
    before = snapshot(stock)
    expected = logits(stock)
    accelerate(stock)
    assert_as_accurate(logits(stock), expected, exact)
    assert calls == {"route": 0, "topk_gate": 0, "expert_mlp": 2}
    restore(stock)
    assert snapshot(stock) == before


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_other_families_in_bf16(family):
    stock = getattr(helpers, family)().bfloat16()
    stock.set_experts_implementation("eager")
    expected, exact = logits(stock), logits(copy.deepcopy(stock).double())
    assert_as_accurate(logits(accelerate(stock)), expected, exact)


# --- what cannot be served --------------------------------------------------------------------------------------------


def test_gpt_oss_is_refused_and_left_alone():
    model = helpers.gpt_oss()
    before = snapshot(model)
    message = r"omnigene_fast cannot run GptOssExperts because its experts have biases; call model\.set_experts_impl"
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert snapshot(model) == before
    model.set_experts_implementation("omnigene_fast")
    with pytest.raises(ValueError, match=message):
        logits(model)
    model.set_experts_implementation("grouped_mm")
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("attribute", "value", "sentence"),
    [
        ("has_bias", True, "its experts have biases"),
        ("is_transposed", True, "stored transposed"),
        ("has_gate", False, "its experts have no gate"),
        ("is_concatenated", False, "interleaved"),
        ("has_post_expert_norm", True, "its experts end in a norm"),
        ("_apply_gate", lambda gate_up: gate_up, "a gate of its own"),
        ("act_fn", nn.ReLU(), "its activation is ReLU"),
        ("act_fn", transformers.activations.QuickGELUActivation(), "its activation is QuickGELUActivation"),
    ],
)
def test_a_refusal_names_its_reason_and_the_way_out(attribute, value, sentence):
    model = helpers.gemma4()
    setattr(moe_layers(model)[1].experts, attribute, value)
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence) as caught:
        accelerate(model)
    assert str(caught.value).endswith('call model.set_experts_implementation("grouped_mm").')
    assert snapshot(model) == before, "the layers before the refused one were changed"
    model.set_experts_implementation("omnigene_fast")
    with pytest.raises(ValueError, match=sentence):
        logits(model)


def test_a_gate_overridden_in_a_subclass_is_refused():
    class Clamped(Gemma4TextExperts):
        def _apply_gate(self, gate_up):
            return super()._apply_gate(gate_up).clamp(-1, 1)

    model = helpers.gemma4()
    moe_layers(model)[0].experts.__class__ = Clamped
    with pytest.raises(ValueError, match="cannot run Clamped because it has a gate of its own"):
        accelerate(model)


def test_quantised_weights_are_refused():
    model = helpers.gemma4()
    experts = moe_layers(model)[0].experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"its gate_up_proj is stored as torch\.float8_e4m3fn"):
        accelerate(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), helpers.gemma4(enable_moe_block=False)])
def test_a_model_without_experts_is_refused(model):
    with pytest.raises(ValueError, match=r"^model: expected .* mixture-of-experts layers, got a \w+ with none\.$"):
        accelerate(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"numerics": "bf16"}, "^numerics: expected 'hf' or 'fp32', got 'bf16'.$"),
        ({"save": "nothing"}, "^save: expected 'preactivation' or 'input', got 'nothing'.$"),
        ({"backend": "sonicmoe"}, "^backend: expected one of auto, cpu, triton, reference, got 'sonicmoe'.$"),
    ],
)
def test_unknown_options_are_named(options, sentence):
    model = helpers.gemma4()
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence):
        accelerate(model, **options)
    assert snapshot(model) == before


def test_a_model_that_is_no_module_is_named():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got str\.$"):
        accelerate("google/gemma-4-26B-A4B")


def test_an_explicit_backend_that_is_missing_raises():
    model = accelerate(helpers.gemma4(), backend="triton")
    with pytest.raises(RuntimeError, match="'triton' is not available"):
        logits(model)


# --- restore ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm", None])
def test_restore_brings_back_exactly_the_stock_model(implementation):
    model = helpers.gemma4()
    model.config._experts_implementation_internal = implementation
    expected = logits(model)
    before = snapshot(model)
    assert accelerate(model) is model
    assert snapshot(model) != before
    accelerate(model, numerics="fp32", backend="reference")
    assert restore(model) is model
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    restore(model)
    assert snapshot(model) == before


def test_restore_leaves_stock_layers_for_a_model_loaded_with_ours():
    model = helpers.gemma4()
    model.set_experts_implementation("omnigene_fast")
    restore(model)
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("omnigene_fast")
    restore(accelerate(model))
    assert model.config._experts_implementation == "grouped_mm"


def test_restore_keeps_an_implementation_chosen_afterwards():
    model = accelerate(helpers.gemma4())
    model.set_experts_implementation("batched_mm")
    restore(model)
    assert model.config._experts_implementation == "batched_mm"


def test_accelerate_changes_no_class_tree_parameter_or_key():
    model = helpers.gemma4()
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys, hooks = (
        list(model.state_dict()),
        {name: dict(module._forward_hooks) for name, module in model.named_modules()},
    )
    accelerate(model)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert {name: dict(module._forward_hooks) for name, module in model.named_modules()} == hooks


# --- copies and files -------------------------------------------------------------------------------------------------


def _deepcopy(model):
    return copy.deepcopy(model)


def _pickle(model):
    return pickle.loads(pickle.dumps(model))


def _torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _torch_save])
def test_a_copy_is_accelerated_and_bound_to_its_own_parameters(duplicate, calls):
    model = accelerate(helpers.gemma4(), numerics="fp32")
    expected = logits(model)
    twin = duplicate(model)
    for name in calls:
        calls[name] = 0
    assert torch.equal(logits(twin), expected)
    assert calls == {"route": 3, "topk_gate": 0, "expert_mlp": 3}
    for layer in moe_layers(model):  # the original's weights are gone, the copy's are not
        layer.router.proj.weight.data.zero_()
        layer.experts.down_proj.data.zero_()
    assert torch.equal(logits(twin), expected)
    restore(model)
    assert moe_layers(twin)[0].router.forward.keywords["numerics"] == "fp32"
    assert torch.equal(logits(restore(twin)), logits(restore(duplicate(twin))))


def test_save_and_load(tmp_path, calls):
    stock = helpers.gemma4()
    expected = logits(stock)
    accelerate(stock).save_pretrained(tmp_path)
    assert "omnigene_fast" not in (tmp_path / "config.json").read_text()
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(tmp_path)
    assert plain.config._experts_implementation == "grouped_mm"
    assert relative_error(logits(plain), expected) < 1e-5
    assert calls["expert_mlp"] == 0
    experts_only = load(tmp_path, experts_implementation="omnigene_fast")
    assert relative_error(logits(experts_only), expected) < 1e-5
    assert calls == {"route": 0, "topk_gate": 0, "expert_mlp": 3}
    assert relative_error(logits(accelerate(experts_only)), expected) < 1e-5
    assert calls == {"route": 3, "topk_gate": 0, "expert_mlp": 6}


def test_moving_and_casting_an_accelerated_model():
    model = accelerate(helpers.gemma4())
    meta = copy.deepcopy(model).to("meta")
    assert meta(tokens().to("meta")).logits.shape == (2, 24, helpers.VOCAB)
    exact = logits(copy.deepcopy(model).double())
    assert exact.dtype == torch.float64
    assert relative_error(logits(model), exact) < 1e-4


# --- the router's forward ---------------------------------------------------------------------------------------------


def test_a_wrapped_projection_is_called(calls):
    """Subclasses, hooks and instance forwards of `proj` and `norm` have their say; restoring them fuses again."""
    model = accelerate(helpers.gemma4())
    router = moe_layers(model)[0].router
    hidden = torch.randn(9, HIDDEN)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def subclass():
        router.proj.__class__ = Doubled
        return lambda: setattr(router.proj, "__class__", nn.Linear)

    def instance_forward():
        router.proj.forward = lambda x: 2 * nn.functional.linear(x, router.proj.weight)
        return lambda: router.proj.__dict__.pop("forward")

    def replaced():
        router.norm.__class__ = type("Halved", (Gemma4RMSNorm,), {"forward": lambda self, x: 2 * self._norm(x)})
        return lambda: setattr(router.norm, "__class__", Gemma4RMSNorm)

    with torch.no_grad():
        plain = router(hidden)[0]
        expected = torch.softmax(2 * plain.log(), -1)
        for change in (
            subclass,
            instance_forward,
            replaced,
            lambda: router.proj.register_forward_hook(lambda module, args, out: 2 * out).remove,
            lambda: router.proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)).remove,
            lambda: router.norm.register_forward_hook(lambda module, args, out: 2 * out).remove,
        ):
            undo = change()
            before = calls["route"]
            assert relative_error(router(hidden)[0], expected) < 1e-5, change
            assert calls["route"] == before
            undo()
            assert torch.equal(router(hidden)[0], plain)
            assert calls["route"] == before + 1


class Doubled(torch.Tensor):
    """Stands for a quantised weight (torchao): a plain `nn.Linear` around a tensor with a product of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 2 * out.as_subclass(torch.Tensor) if func is nn.functional.linear else out


def test_a_weight_with_a_product_of_its_own_is_called(calls):
    router = moe_layers(accelerate(helpers.gemma4()))[0].router
    hidden = torch.randn(9, HIDDEN)
    with torch.no_grad():
        expected = torch.softmax(2 * router(hidden)[0].log(), -1)
        router.proj.weight = nn.Parameter(router.proj.weight.detach().as_subclass(Doubled))
        assert relative_error(router(hidden)[0], expected) < 1e-5
    assert (calls["route"], calls["topk_gate"]) == (1, 1)


def test_a_projection_of_another_dtype_is_called(calls):
    """Stock transformers would promote or fail, and so do we: the module decides."""
    model = accelerate(helpers.gemma4(torch.bfloat16))
    router = moe_layers(model)[0].router
    stock = restore(copy.deepcopy(router))
    for changed in (router, stock):
        changed.scale.data = changed.scale.data.float()
        changed.proj.float()
    hidden = torch.randn(9, HIDDEN).bfloat16()
    with torch.no_grad():
        for mine, same in zip(router(hidden), stock(hidden), strict=True):
            assert relative_error(mine, same) < 1e-6
    assert calls["route"] == 0


def test_a_router_subclass_with_its_own_forward_is_left_alone():
    class Mine(Gemma4TextRouter):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    model = helpers.gemma4()
    router = moe_layers(model)[0].router
    router.__class__ = Mine
    accelerate(model)
    assert "forward" not in router.__dict__
    assert "forward" in moe_layers(model)[1].router.__dict__


def test_a_forward_replaced_by_another_tool_is_refused():
    model = helpers.gemma4()
    router = moe_layers(model)[2].router
    router.forward = lambda hidden: Gemma4TextRouter.forward(router, hidden)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Gemma4TextRouter, got one that another tool put there"):
        accelerate(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("order", ["hooks first", "accelerate first"])
def test_device_hooks_of_the_accelerate_library(order, calls):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Seen(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.count += 1
            return args, kwargs

    model = helpers.gemma4()
    before = snapshot(model)
    expected = logits(model)
    router = moe_layers(model)[0].router
    if order == "hooks first":
        add_hook_to_module(router, Seen())
        accelerate(model)
    else:
        accelerate(model)
        add_hook_to_module(router, Seen())
    Seen.count = 0
    assert relative_error(logits(model), expected) < 1e-5
    assert (Seen.count, calls["route"]) == (1, 3)
    restore(model)
    assert torch.equal(logits(model), expected)
    assert (Seen.count, calls["route"]) == (2, 3)
    remove_hook_from_module(router)
    router.__dict__.pop("forward", None)  # the accelerate library leaves the bound method behind
    assert snapshot(model) == before


# --- PEFT -------------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


@pytest.mark.parametrize("order", ["accelerate first", "peft first"])
def test_lora_on_attention_and_router(order, calls):
    """The paper's recipe: the wrapped projection gives the wrapped result."""
    config = peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "router.proj"])
    stock = helpers.gemma4()
    ours = copy.deepcopy(stock)
    unadapted = logits(stock)
    torch.manual_seed(1)
    stock = peft.get_peft_model(stock, config)
    torch.manual_seed(1)
    if order == "accelerate first":
        ours = peft.get_peft_model(accelerate(ours), config)
    else:
        ours = accelerate(peft.get_peft_model(ours, config))
    expected = logits(stock)
    assert relative_error(unadapted, expected) > 1e-2
    assert relative_error(logits(ours), expected) < 1e-5
    assert calls == {"route": 0, "topk_gate": 3, "expert_mlp": 3}
    with ours.disable_adapter():
        assert relative_error(logits(ours), unadapted) < 1e-5
    assert list(peft.get_peft_model_state_dict(ours)) == list(peft.get_peft_model_state_dict(stock))
    merged = ours.merge_and_unload()
    assert relative_error(logits(merged), expected) < 1e-4
    assert calls["route"] == 3, "after merging the projection is a plain linear layer again"
    restore(merged)
    assert relative_error(logits(merged), expected) < 1e-4


def test_only_the_adapted_router_is_wrapped(calls):
    config = peft.LoraConfig(**LORA, target_modules=r".*layers\.1\.router\.proj")
    logits(accelerate(peft.get_peft_model(helpers.gemma4(), config)))
    assert (calls["route"], calls["topk_gate"]) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_experts_parameters(dtype):
    """`target_parameters` parametrises the weights during the forward; H != I hides no transposition."""
    config = peft.LoraConfig(**LORA, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    stock = helpers.gemma4(dtype)
    stock.set_experts_implementation("eager")
    unadapted = logits(stock)
    stock = peft.get_peft_model(stock, config)
    exact = logits(copy.deepcopy(stock).double())
    expected = logits(stock)
    assert relative_error(unadapted, exact) > 1e-2
    accelerate(stock)
    assert_as_accurate(logits(stock), expected, exact)
    merged = stock.merge_and_unload()
    assert_as_accurate(logits(merged), expected, exact)


# --- expert parallelism -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sentinels_equal_grouped_mm(dtype):
    model = helpers.gemma4(dtype)
    experts = moe_layers(model)[0].experts
    experts._is_expert_parallel = True
    hidden = torch.randn(17, HIDDEN).to(dtype)
    index, weights = helpers.routing("uniform", 17, TOP_K, EXPERTS, seed=0)
    index[::2, 1] = EXPERTS
    index[5] = EXPERTS
    weights = weights.masked_fill(index == EXPERTS, 0)
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        expected = experts(hidden, index.clone(), weights)
        model.set_experts_implementation("omnigene_fast")
        out = experts(hidden, index, weights)
        exact = helpers.experts_truth(experts, hidden, index, weights)
    assert_as_accurate(out, expected, exact)
    assert torch.equal(out[5], torch.zeros_like(out[5]))


def test_an_id_out_of_range_without_expert_parallelism_raises():
    model = accelerate(helpers.gemma4())
    experts = moe_layers(model)[0].experts
    experts._is_expert_parallel = False  # as transformers sets it; 5.17 has no such flag and takes sentinels always
    with pytest.raises(IndexError, match="index: expected expert ids in"):
        experts(torch.randn(1, HIDDEN), torch.tensor([[EXPERTS]]), torch.ones(1, 1))


# --- activations ------------------------------------------------------------------------------------------------------


SERVED = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "silu": "silu",
    "swish": "silu",
}


@pytest.mark.parametrize(("theirs", "ours"), SERVED.items())
def test_the_activation_is_what_the_class_computes(theirs, ours, monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "expert_mlp", _recording(ops.expert_mlp, seen))
    model = accelerate(helpers.gemma4())
    experts = moe_layers(model)[0].experts
    experts.act_fn = transformers.activations.ACT2FN[theirs]
    hidden = torch.randn(9, HIDDEN)
    index, weights = helpers.routing("uniform", 9, TOP_K, EXPERTS, seed=0)
    with torch.no_grad():
        out = experts(hidden, index, weights)
        with helpers.experts_implementation(model, "eager"):
            expected = experts(hidden, index, weights)
    assert [kwargs["activation"] for kwargs in seen] == [ours]
    assert relative_error(out, expected) < 1e-6


def test_every_other_activation_of_transformers_is_refused():
    model = helpers.gemma4()
    experts = moe_layers(model)[0].experts
    for name in set(transformers.activations.ACT2FN) - set(SERVED):
        experts.act_fn = transformers.activations.ACT2FN[name]
        with pytest.raises(ValueError, match=f"its activation is {type(experts.act_fn).__name__};"):
            accelerate(model)


def test_the_forward_is_told_from_others_by_its_function():
    assert not router_module._is_ours(None)
    assert not router_module._is_ours(lambda hidden: hidden)


def test_an_activation_may_be_a_function():
    experts = moe_layers(helpers.gemma4())[0].experts
    del experts.act_fn  # a module; torch lets no function take its name
    experts.act_fn = torch.nn.functional.silu
    assert experts_module.activation_of(experts) == "silu"
    experts.act_fn = torch.nn.functional.relu
    with pytest.raises(ValueError, match="its activation is relu;"):
        experts_module.activation_of(experts)


def test_experts_with_a_gate_of_their_own_and_no_act_fn_are_refused_for_the_gate():
    experts = moe_layers(helpers.gemma4())[0].experts
    del experts.act_fn
    experts._apply_gate = lambda gate_up: gate_up
    with pytest.raises(ValueError, match="a gate of its own"):
        experts_module.activation_of(experts)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_routers_forward_reads_as_a_method(copied):
    """Tools for dissection read the source of a forward, its name, and whose it is."""
    stock = moe_layers(helpers.gemma4())[0].router.forward
    router = moe_layers(copied(omnigene_fast.accelerate(helpers.gemma4())))[0].router
    assert router.forward.__self__ is router
    assert router.forward.__name__ == stock.__name__ == "forward"
    assert "ops.route(" in inspect.getsource(router.forward)
    assert inspect.signature(router.forward) == inspect.signature(stock)
    assert router_module.is_accelerated(router)


@pytest.mark.parametrize("first", ["hook", "accelerate"])
@pytest.mark.parametrize("before", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("lora", [False, True])
def test_hooks_on_an_experts_activation_are_called(before, first, lora):
    """Neurons that a hook switches off are off; without the hook the kernels run again."""

    def ablated(accelerated):
        model = helpers.gemma4()
        model.set_experts_implementation(before)
        if lora:
            torch.manual_seed(0)
            config = peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2)
            model = peft.get_peft_model(model, config)
        if accelerated and first == "accelerate":
            accelerate(model)
        seen = []
        off = lambda module, args, output: seen.append(1) or output.index_fill(-1, torch.arange(9), 0)  # noqa: E731
        experts = [module for module in model.modules() if experts_module.is_experts(module)]
        hooks = [each.act_fn.register_forward_hook(off) for each in experts]
        if accelerated and first == "hook":
            accelerate(model)
        out = logits(model)
        assert seen
        for hook in hooks:
            hook.remove()
        return out, logits(model), len(seen)

    expected, stock, _ = ablated(False)
    found, plain, calls = ablated(True)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, stock) < 1e-5
    assert relative_error(stock, expected) > 1e-3
    assert calls >= len(moe_layers(helpers.gemma4()))


def test_hooks_on_the_activation_of_8_bit_experts_are_refused():
    model = accelerate(helpers.gemma4(), experts_dtype="int8")
    hook = moe_layers(model)[0].experts.act_fn.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(
        ValueError, match="its act_fn has hooks, and only the fused forward reads 8 bits; remove the hooks"
    ):
        logits(model)
    hook.remove()
    logits(model)


class _Rounded(torch.Tensor):
    """Weight-only quantisation as torchao's: looks like a floating tensor, and gives plain ones to aten alone."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.weight = weight

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(args[0].weight))
        if func.namespace != "aten":
            raise NotImplementedError(f"no rule for {func}")
        plain = lambda x: x.weight if isinstance(x, cls) else x  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_another_tool_quantised_are_refused(name, when):
    model = helpers.gemma4()
    expected = logits(model)
    if when == "after":
        accelerate(model)
    experts = moe_layers(model)[0].experts
    setattr(experts, name, nn.Parameter(_Rounded(getattr(experts, name).detach()), requires_grad=False))
    with pytest.raises(ValueError, match=f"its {name} is a _Rounded, which another tool quantises or packs; call"):
        accelerate(model)
    if when == "after":
        with pytest.raises(ValueError, match=f"its {name} is a _Rounded"):
            logits(model)
        omnigene_fast.restore(model)
    assert relative_error(logits(model), expected) < 1e-5
