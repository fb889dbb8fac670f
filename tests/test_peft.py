"""LoRA on the experts' parameters with stock PEFT, against PEFT's own way on transformers' own experts."""

import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import omnigene_fast
from omnigene_fast import info, ops
from omnigene_fast.integrations import peft as peft_module

from . import helpers
from .helpers import EXPERTS, HIDDEN, TOP_K, allocations, assert_as_accurate, moe_layers, relative_error, tokens

F32, BF16 = torch.float32, torch.bfloat16
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
INTERMEDIATE = 40
WEIGHT_BYTES = 4 * EXPERTS * 2 * INTERMEDIATE * HIDDEN  # of the gate and up projections in float32
ORDERS = ("accelerate first", "peft first")


def config(targets=TARGETS, **changes):
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": []}
    return peft.LoraConfig(**options | changes, target_parameters=list(targets))


def adapt(model, *configs, seed=1, **options):
    """`model` with one adapter for each config, all active, with the same random factors for the same seed."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, configs[0], **options)
    names = ["default", *(f"more{n}" for n in range(1, len(configs)))]
    for name, extra in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, extra)
    model.base_model.set_adapter(names)
    return model.eval()


def pair(*configs, order="accelerate first", dtype=F32, model=None, save="preactivation", **options):
    """An accelerated and a stock model with the same weights and adapters."""
    stock = helpers.gemma4(dtype) if model is None else model
    stock.set_experts_implementation("eager")
    ours = copy.deepcopy(stock)
    if order == "accelerate first":
        ours = adapt(omnigene_fast.accelerate(ours, save=save), *configs, **options)
    else:
        ours = omnigene_fast.accelerate(adapt(ours, *configs, **options), save=save)
    return ours, adapt(stock, *configs, **options)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def train_step(model):
    """The loss of a batch and the gradients of all that is trainable, by name."""
    model.zero_grad()
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(ours, stock):
    loss, gradients = train_step(ours)
    expected_loss, expected = train_step(stock)
    assert relative_error(loss, expected_loss) < 1e-5
    assert list(gradients) == list(expected)
    assert any("lora_A" in name for name in expected)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.fixture
def built(monkeypatch):
    """How often PEFT built a merged weight or a delta, and registered a parametrization."""
    counts = {"baddbmm": 0, "einsum": 0, "register_parametrization": 0}
    for name, owner in (("baddbmm", torch), ("einsum", torch), ("register_parametrization", parametrize)):
        original = getattr(owner, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return counts


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("save", ops.SAVE)
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
def test_bug_14_loss_and_gradients_equal_pefts_own(targets, save, order, built):
    """14: Unsloth zoo #624, #913: swapped dimensions, which square sizes hide. Here H = 64 and I = 40."""
    ours, stock = pair(config(targets), order=order, save=save)
    train_step(ours)
    assert not any(built.values())
    assert_same_step(ours, stock)
    assert built["baddbmm"] > 0, "the stock model built nothing: the counts show nothing"


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_ranks(rank, built):
    ours, stock = pair(config(r=rank))
    assert_same_step(ours, stock)


def test_rank_stabilised_scaling():
    ours, stock = pair(config(r=3, use_rslora=True))
    assert moe_layers(stock)[0].experts.scaling["default"] == 6 / math.sqrt(3)
    assert_same_step(ours, stock)


@pytest.mark.parametrize("order", ORDERS)
def test_several_adapters(order, built):
    """Their sum, whatever their ranks; then one of them, then none."""
    configs = config(r=4), config(r=1, lora_alpha=3), config(r=9, use_rslora=True)
    ours, stock = pair(*configs, order=order)
    train_step(ours)
    assert not any(built.values())
    assert_same_step(ours, stock)
    together = logits(ours)
    for model in (ours, stock):
        model.set_adapter("more1")
    assert relative_error(logits(ours), logits(stock)) < 1e-5
    assert relative_error(logits(ours), together) > 1e-3
    with ours.disable_adapter(), stock.disable_adapter():
        assert relative_error(logits(ours), logits(stock)) < 1e-5
        assert relative_error(logits(ours), logits(helpers.gemma4())) < 1e-5
    ours.delete_adapter("more1")
    ours.set_adapter("default")
    stock.set_adapter("default")
    assert_same_step(ours, stock)


def run(experts, hidden, index, weights, grad):
    """The output of an experts module and the gradients of hidden, weights and all that is trainable."""
    experts.zero_grad()
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = experts(hidden, index, weights)
    out.backward(grad)
    results = {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad}
    return results | {name: p.grad for name, p in experts.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapters", [F32, BF16])
@pytest.mark.parametrize("rank", [1, 16])
def test_bf16_base_is_as_accurate_as_pefts_own(rank, adapters):
    """`autocast_adapter_dtype` makes PEFT keep float32 adapters on a bfloat16 model; PEFT computes in bfloat16."""
    ours, stock = pair(config(r=rank, use_rslora=True), dtype=BF16, autocast_adapter_dtype=adapters == F32)
    ours, stock = (moe_layers(model)[1].experts for model in (ours, stock))
    assert {p.dtype for name, p in ours.named_parameters() if "lora" in name} == {adapters}
    exact = copy.deepcopy(stock).double()
    hidden, grad = torch.randn(2, 65, HIDDEN).bfloat16()
    index, weights = helpers.routing("uniform", 65, TOP_K, EXPERTS, seed=0)
    results = [run(m, hidden, index, weights, grad) for m in (ours, stock)]
    truth = run(exact, hidden.double(), index, weights.double(), grad.double())
    for name, expected in truth.items():
        assert results[0][name].dtype == results[1][name].dtype
        assert_as_accurate(results[0][name], results[1][name], expected, name)


@pytest.mark.parametrize("mistake", ["scaling", "transposed factor", "next expert"])
def test_the_comparison_rejects(mistake):
    ours, stock = pair(config())
    wrapper = moe_layers(ours)[1].experts
    if mistake == "scaling":
        wrapper.scaling["default"] *= 1.01
    elif mistake == "transposed factor":  # expert-major read as rank-major
        weight = wrapper.lora_A["default"].weight
        weight.data = weight.data.unflatten(0, (EXPERTS, 4)).transpose(0, 1).reshape(weight.shape)
    else:
        weight = wrapper.lora_A["default"].weight
        weight.data = weight.data.roll(4, 0)
    with pytest.raises(AssertionError):
        assert_same_step(ours, stock)


def test_bug_16_every_expert_tensor_trains():
    """16: vLLM #41754, #50252 dropped expert LoRA silently: count what trains, and see a gradient on each tensor."""
    ours, stock = pair(config(r=4))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, stock)]
    per_layer = 4 * EXPERTS * (HIDDEN + 2 * INTERMEDIATE + INTERMEDIATE + HIDDEN)
    assert counts == [3 * per_layer] * 2
    _, gradients = train_step(ours)
    assert len(gradients) == 3 * 2 * 2
    for name, gradient in gradients.items():
        if "lora_A" in name:  # expert-major
            of_expert = gradient.unflatten(0, (EXPERTS, 4))
        else:  # rank-major
            of_expert = gradient.unflatten(1, (4, EXPERTS)).permute(2, 0, 1)
        assert (of_expert.flatten(1).norm(dim=1) > 0).all(), name


def test_fp32_activations_and_autocast():
    ours, stock = pair(config(), dtype=BF16)
    with torch.autocast("cpu", BF16):
        loss, gradients = train_step(ours)
    expected_loss, expected = train_step(stock)
    assert relative_error(loss, expected_loss) < 1e-2
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten().float(), expected[name].flatten().float(), 0) > 0.9, name


def test_another_family():
    stock = helpers.qwen3_moe()
    ours, stock = pair(config(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), model=stock)
    assert_same_step(ours, stock)


def test_compiled_experts():
    """Forward and backward in one graph, factors included."""
    ours, stock = (moe_layers(model)[0].experts for model in pair(config(), config(r=2)))
    hidden, grad = torch.randn(2, 9, HIDDEN)
    index, weights = helpers.routing("uniform", 9, TOP_K, EXPERTS, seed=0)
    expected = run(stock, hidden, index, weights, grad)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    for name, value in run(ours, hidden, index, weights, grad).items():
        assert relative_error(value, expected[name]) < 1e-5, name


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_the_merged_weight_is_never_built(adapters, checkpointing):
    """No allocation of the size of a projection, forward and backward; PEFT's own way is the control."""
    ours, stock = pair(*[config()] * adapters)
    largest = []
    for model in (ours, stock):
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.train()
        train_step(model)
        with allocations() as sizes:
            train_step(model)
        largest.append(max(sizes))
    assert largest[0] < WEIGHT_BYTES <= largest[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant):
    ours, stock = pair(config())
    for model in (ours, stock):
        model.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.train()
    assert_same_step(ours, stock.train())


# --- adapters on and off, merged and saved ----------------------------------------------------------------------------


def test_disabled_adapters():
    ours, stock = pair(config())
    unadapted, adapted = logits(helpers.gemma4()), logits(stock)
    assert relative_error(adapted, unadapted) > 1e-2
    with ours.disable_adapter():
        assert relative_error(logits(ours), unadapted) < 1e-5
    assert relative_error(logits(ours), adapted) < 1e-5


def test_merged_and_unmerged():
    ours, stock = pair(config())
    adapted = logits(stock)
    ours.merge_adapter()
    assert relative_error(logits(ours), adapted) < 1e-5
    ours.unmerge_adapter()
    assert relative_error(logits(ours), adapted) < 1e-5
    ours.merge_adapter()
    with ours.disable_adapter():  # unmerges
        assert relative_error(logits(ours), logits(helpers.gemma4())) < 1e-5
    assert not moe_layers(ours)[0].experts.merged
    assert_same_step(ours, stock)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapters", [1, 2])
def test_bug_15_the_merged_model_equals_the_adapter_model(adapters, order):
    """15: Unsloth #6387, zoo #779: the merge dropped all expert deltas."""
    ours, stock = pair(*[config(r=r) for r in (4, 2)[:adapters]], order=order)
    adapted = logits(ours)
    assert relative_error(adapted, logits(helpers.gemma4())) > 1e-2
    names = list(ours.peft_config)
    merged, expected = (model.merge_and_unload(adapter_names=names) for model in (ours, stock))
    assert relative_error(logits(merged), adapted) < 1e-5
    assert relative_error(logits(merged), logits(expected)) < 1e-5
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in helpers.gemma4().named_modules()]
    assert merged.config._experts_implementation == "omnigene_fast"


def test_save_and_reload(tmp_path):
    ours, stock = pair(config())
    for path, model in (("ours", ours), ("stock", stock)):
        model.save_pretrained(tmp_path / path)
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "stock/adapter_config.json").read_text()
    mine, theirs = (peft.load_peft_weights(str(tmp_path / path)) for path in ("ours", "stock"))
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    base = omnigene_fast.accelerate(helpers.gemma4())
    again = peft.PeftModel.from_pretrained(base, tmp_path / "stock", is_trainable=True)
    assert torch.equal(logits(again), logits(ours))
    assert_same_step(again, stock)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_uses_its_own_factors(duplicate):
    ours, stock = pair(config())
    if duplicate == "deepcopy":
        twin = copy.deepcopy(ours)
    elif duplicate == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    for name, parameter in ours.named_parameters():
        if "lora" in name:
            parameter.data.zero_()
    assert_same_step(twin, stock)


# --- PEFT's own way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"use_dora": True}, "does not work with use_dora=True"), ({"lora_dropout": 0.1}, "lora_dropout != 0")],
)
def test_what_peft_refuses_stays_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapt(omnigene_fast.accelerate(helpers.gemma4()), config(**changes))


def test_mixed_batches_are_refused_by_peft():
    ours, _ = pair(config())
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        ours(tokens(), adapter_names=["default", "default"])


def test_another_implementation_runs_pefts_own_way(built):
    ours, stock = pair(config())
    ours.base_model.model.set_experts_implementation("eager")
    assert_same_step(ours, stock)
    assert built["baddbmm"] > 0
    before = built["baddbmm"]
    ours.base_model.model.set_experts_implementation("omnigene_fast")
    train_step(ours)
    assert built["baddbmm"] == before


def test_an_older_peft_runs_its_own_way_and_is_named(built, monkeypatch, caplog):
    """Before 0.21 PEFT had no `get_delta_factors`."""
    peft_module._say_that_peft_is_old.cache_clear()
    stock = pair(config(), config(r=2))[1]
    assert "peft>=0.21" not in caplog.text
    monkeypatch.delattr(peft.tuners.lora.layer.ParamWrapper, "get_delta_factors")
    ours = omnigene_fast.accelerate(copy.deepcopy(stock))
    assert caplog.text.count("peft>=0.21") == 1
    assert_same_step(ours, stock)
    assert built["einsum"] > 0


def test_an_adapter_added_by_transformers(built):
    """`model.add_adapter`, without a `PeftModel` around it."""
    if (reason := info.peft_refused()) is not None:
        pytest.skip(reason)
    model, stock = omnigene_fast.accelerate(helpers.gemma4()), helpers.gemma4()
    for adapted in (model, stock):
        torch.manual_seed(1)
        adapted.add_adapter(config())
    train_step(model)
    assert not any(built.values())
    assert_same_step(model, stock)


def test_restore_leaves_pefts_own_way(built):
    ours, stock = pair(config(), order="peft first")
    assert "forward" in moe_layers(ours)[0].experts.__dict__
    omnigene_fast.restore(ours)
    for layer in moe_layers(ours):
        assert "forward" not in layer.experts.__dict__
        assert "forward" not in layer.experts.base_layer.__dict__
    assert_same_step(ours, stock)
    plain = omnigene_fast.restore(omnigene_fast.accelerate(helpers.gemma4()))
    assert "forward" not in moe_layers(adapt(plain, config()))[0].experts.__dict__


def test_factors_of_a_parametrization_are_used_without_its_sum(built):
    """Without `accelerate`, by `experts_implementation="omnigene_fast"`: torch builds the sum once, to check it."""
    _, stock = pair(config())
    ours = copy.deepcopy(stock)
    ours.base_model.model.set_experts_implementation("omnigene_fast")
    logits(ours)
    assert built["baddbmm"] == built["register_parametrization"] == 3 * 2
    assert_same_step(ours, stock)


def test_another_parametrization_is_read():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    stock = helpers.gemma4()
    stock.set_experts_implementation("eager")
    for layer in moe_layers(stock):
        parametrize.register_parametrization(layer.experts, "gate_up_proj", Halved())
    ours = omnigene_fast.accelerate(copy.deepcopy(stock))
    assert relative_error(logits(ours), logits(stock)) < 1e-5
    assert relative_error(logits(ours), logits(helpers.gemma4())) > 1e-2


def test_a_wrapper_of_another_parameter_is_left_alone(built):
    """`router.proj.weight` as a target parameter: a wrapper of the same class, around no experts."""
    ours, stock = pair(config(["router.proj.weight"]))
    assert_same_step(ours, stock)
    assert all("forward" not in layer.router.proj.__dict__ for layer in moe_layers(ours))


def test_a_forward_of_another_tool_stays():
    model = adapt(helpers.gemma4(), config())
    wrapper = moe_layers(model)[0].experts
    wrapper.forward = mine = lambda *args: type(wrapper).forward(wrapper, *args)
    omnigene_fast.accelerate(model)
    assert wrapper.__dict__["forward"] is mine
    _, stock = pair(config())
    assert_same_step(model, stock)


def test_device_hooks_of_the_accelerate_library(built):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = adapt(helpers.gemma4(), config())
    wrapper = moe_layers(model)[0].experts
    add_hook_to_module(wrapper, ModelHook())
    omnigene_fast.accelerate(model)
    logits(model)
    assert not any(built.values())
    omnigene_fast.restore(model)
    expected = logits(model)
    assert built["baddbmm"] > 0
    assert relative_error(expected, logits(pair(config())[1])) < 1e-5


def test_accelerate_does_not_import_peft():
    script = """
import sys
from tests import helpers
import omnigene_fast
omnigene_fast.accelerate(helpers.gemma4())
assert not [name for name in sys.modules if name == "peft" or name.startswith("peft.")]
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_low_precision_experts_are_refused():
    model = helpers.gemma4()
    experts = moe_layers(model)[0].experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"its gate_up_proj is stored as torch\.float8_e4m3fn"):
        omnigene_fast.accelerate(adapt(model, config()))
