"""Training accelerated models in the surroundings that train them, against stock transformers."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import omnigene_fast
from omnigene_fast import ops

from . import helpers
from .gradients import Comparison
from .helpers import EXPERTS, HIDDEN, allocations, moe_layers, relative_error, tokens

F32, BF16 = torch.float32, torch.bfloat16
STEPS = 50
EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
NO_BITSANDBYTES = "bitsandbytes is not installed (pip install bitsandbytes)"
# The paper's recipe: experts frozen, LoRA on attention, the dense MLP and the router's projection.
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router.proj"]
RECIPES = {
    "full": None,
    "frozen experts": {"target_modules": MODULES},
    "lora on experts": {"target_modules": MODULES, "target_parameters": EXPERT_PARAMETERS},
}


def prepared(recipe, dtype=F32, seed=0, implementation="eager", changes=None, **options):
    """A model to train by `recipe`, with `changes` of its config; accelerated if `implementation` is ours."""
    model = helpers.gemma4(dtype, seed=seed, **changes or {})
    if implementation == "omnigene_fast":
        omnigene_fast.accelerate(model, **options)
    else:
        model.set_experts_implementation(implementation)
    if RECIPES[recipe] is not None:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **RECIPES[recipe])
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return model.train()


def pair(recipe, changes=None, **options):
    ours = prepared(recipe, implementation="omnigene_fast", changes=changes, **options)
    return ours, prepared(recipe, changes=changes)


def losses(model, steps=STEPS, seed=0, optimizer=torch.optim.AdamW, lr=1e-3):
    """The loss of each step of training on batches that repeat, so that there is something to learn."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    curve = []
    for step in range(steps):
        batch = tokens(2, 24, seed=1000 * seed + step % 8)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


def train_step(model):
    model.zero_grad()
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(ours, stock):
    (loss, gradients), (expected_loss, expected) = train_step(ours), train_step(stock)
    assert relative_error(loss, expected_loss) < 1e-5
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


# --- loss curves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "save"),
    [("full", "preactivation"), ("full", "input"), ("frozen experts", "preactivation"), ("lora on experts", "input")],
)
def test_curves_coincide_in_float32(recipe, save):
    ours, stock = (losses(model) for model in pair(recipe, save=save))
    difference = (ours - stock).abs() / stock
    assert difference[:10].max() < 1e-5
    assert difference.max() < 1e-3
    assert stock[-8:].mean() < 0.9 * stock[:8].mean(), "nothing was learned: the curves show nothing"


@pytest.mark.parametrize("mistake", ["weights' gradient", "activation"])
def test_curves_reject(mistake, monkeypatch):
    """A gradient that is lost, or a slightly wrong function, parts the curves."""
    ours, stock = pair("full")
    if mistake == "activation":
        for layer in moe_layers(ours):
            layer.experts.act_fn = nn.SiLU()
    else:
        original = ops.expert_mlp

        def detached(hidden, gate_up, down, index, weights, **kwargs):
            return original(hidden, gate_up, down, index, weights.detach(), **kwargs)

        monkeypatch.setattr(ops, "expert_mlp", detached)
    ours, stock = losses(ours, 10), losses(stock, 10)
    assert ((ours - stock).abs() / stock).max() > 1e-5


def test_curves_in_bfloat16_lie_within_the_spread_of_stock():
    """Two stock implementations part by rounding; ours is no further from them than they are from each other."""
    curves = {}
    for name in ("eager", "grouped_mm", "omnigene_fast", "wrong"):
        curves[name] = []
        for seed in range(3):
            model = prepared("full", BF16, seed, "omnigene_fast" if name == "wrong" else name)
            if name == "wrong":
                for layer in moe_layers(model):
                    layer.experts.act_fn = nn.SiLU()
            curves[name].append(losses(model, seed=seed))
    eager, grouped, ours, wrong = (torch.stack(found) for found in curves.values())
    spread = (eager - grouped).abs().mean()

    def distance(curve):
        return min((curve - eager).abs().mean(), (curve - grouped).abs().mean()) / spread

    assert distance(ours) <= 1.3 < distance(wrong)
    assert (ours.mean() - (eager + grouped).mean() / 2).abs() <= spread


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bug_25_a_checkpointed_forward_counts_once(recipe, reentrant):
    """25: what runs in a forward that checkpointing repeats happens twice: gradients must be those of one."""
    ours, stock = pair(recipe)
    plain = train_step(ours)[1]
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(ours, stock)
    for name, gradient in train_step(ours)[1].items():
        assert torch.equal(gradient, plain[name]), name


def test_gradient_accumulation_adds_up():
    ours, _ = pair("full")
    _, once = train_step(ours)
    once = {name: gradient.clone() for name, gradient in once.items()}
    ours(tokens(), labels=tokens()).loss.backward()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name]), name


@pytest.mark.parametrize("weights", [F32, BF16])
def test_bug_17_autocast_dtypes_in_the_backward(weights):
    """17: axolotl #3805: float32 activations, bfloat16 weights or autocast, forward and backward through the gate."""
    stock = moe_layers(helpers.gemma4(weights))[1]
    stock.experts.config._experts_implementation_internal = "eager"
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    ours.experts.config = copy.deepcopy(stock.experts.config)
    ours.experts.config._experts_implementation_internal = "omnigene_fast"
    holder = nn.ModuleList([ours])
    omnigene_fast.accelerate(holder)
    hidden, grad = torch.randn(2, 400, HIDDEN)
    with torch.autocast("cpu", BF16), torch.no_grad():
        agree = (ours.router(hidden)[2] == stock.router(hidden)[2]).all(-1)
    agree &= (ours.router(hidden)[2] == exact.router(hidden.double())[2]).all(-1) if weights == F32 else agree
    agree &= (stock.router(hidden.to(weights))[2] == exact.router(hidden.double())[2]).all(-1)
    hidden, grad = hidden[agree], grad[agree]
    assert hidden.shape[0] > 100

    def run(layer, hidden, grad, autocast):
        layer.zero_grad()
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast):
            _, top, index = layer.router(leaf)
            out = layer.experts(leaf, index, top)
        out.backward(grad.to(out.dtype))
        parts = {"router": layer.router, "experts": layer.experts}
        grads = {f"{part}.{n}": p.grad for part, module in parts.items() for n, p in module.named_parameters()}
        return {"out": out.detach(), "hidden": leaf.grad, **grads}

    mine, theirs = (run(layer, hidden, grad, True) for layer in (ours, stock))
    truth = run(exact, hidden.double(), grad.double(), False)
    for name, gradient in mine.items():
        assert gradient.dtype == theirs[name].dtype, name
    Comparison().add(mine, theirs, truth).check()


@pytest.mark.parametrize("order", ["accelerate first", "peft first"])
def test_bug_38_a_wrapped_projection_trains(order):
    """38: a fused router that reads `.weight` of a wrapped projection sends the adapter no gradient. Training part."""
    stock = prepared("frozen experts")
    if order == "accelerate first":
        ours = prepared("frozen experts", implementation="omnigene_fast")
    else:
        ours = omnigene_fast.accelerate(copy.deepcopy(stock))
    assert_same_step(ours, stock)
    gradients = [p.grad for name, p in ours.named_parameters() if "router.proj.lora" in name]
    assert len(gradients) == 3 * 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_frozen_router_or_embedding_is_no_special_case():
    """Only one kind of parameter trains at a time."""
    for wanted in ("router.proj", "router.scale", "per_expert_scale", "gate_up_proj", "experts.down_proj", "embed"):
        ours, stock = pair("full")
        for model in (ours, stock):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted in name)
        assert_same_step(ours, stock)


def test_router_probabilities_carry_a_gradient():
    """A load-balancing loss on `output[0]` of the router, as hooks and `output_router_logits` read it."""
    ours, stock = pair("full")
    gradients = []
    for model in (ours, stock):
        seen = []
        for layer in moe_layers(model):
            layer.router.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0]))
        model(tokens())
        sum(p.mean(0).square().sum() * EXPERTS for p in seen).backward()
        gradients.append([layer.router.proj.weight.grad for layer in moe_layers(model)])
    for mine, expected in zip(*gradients, strict=True):
        assert expected.abs().sum() > 0
        assert relative_error(mine, expected) < 1e-4


def test_frozen_experts_allocate_nothing_of_the_size_of_weights():
    """The whole step of the paper's recipe, with checkpointing; the full step is the control."""
    largest = {}
    for recipe in ("frozen experts", "full"):
        model = prepared(recipe, implementation="omnigene_fast")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        train_step(model)
        with allocations() as sizes:
            train_step(model)
        largest[recipe] = max(sizes)
    weight = 4 * moe_layers(model)[0].experts.down_proj.numel()
    assert largest["frozen experts"] < weight <= largest["full"]


# --- optimizers and quantised modules ---------------------------------------------------------------------------------


def test_an_optimizer_built_before_accelerate_updates_what_runs():
    model = helpers.gemma4()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    omnigene_fast.accelerate(model)
    assert all(mine is same for mine, same in zip(model.parameters(), parameters, strict=True))
    before, _ = train_step(model)
    optimizer.step()
    assert train_step(model)[0] < before


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_optimizers(name):
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)"
    )
    optimizer = getattr(bitsandbytes.optim, name)
    try:
        parameter = nn.Parameter(torch.ones(8192))
        parameter.grad = torch.ones(8192)
        optimizer([parameter]).step()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes' {name} does not run on this processor: {error}")
    ours, stock = (losses(model, 10, optimizer=optimizer) for model in pair("full"))
    assert ((ours - stock).abs() / stock).max() < 1e-3
    assert stock[-1] < stock[0]


def test_bitsandbytes_4bit_projection():
    """NF4 on `router.proj` alone, without an adapter: called, and its gradient goes on to the tokens."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NO_BITSANDBYTES)
    stock = helpers.gemma4()
    stock.set_experts_implementation("eager")
    try:
        for layer in moe_layers(stock):
            quantised = bitsandbytes.nn.Linear4bit(HIDDEN, EXPERTS, bias=False, quant_type="nf4", compute_dtype=F32)
            quantised.load_state_dict({"weight": layer.router.proj.weight.detach()})
            layer.router.proj = quantised.to("cpu")
        stock(tokens())
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes' Linear4bit does not run on this processor: {error}")
    ours = omnigene_fast.accelerate(copy.deepcopy(stock))
    assert_same_step(ours.train(), stock.train())


def test_a_model_loaded_in_4bit(tmp_path):
    """The paper's way: NF4 on every Linear, experts as they are, PEFT's preparation, LoRA on everything."""
    pytest.importorskip("bitsandbytes", reason=NO_BITSANDBYTES)
    helpers.gemma4().save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=F32
    )
    models = []
    for implementation in ("eager", "omnigene_fast"):
        options = {"quantization_config": quantised, "device_map": "cpu", "experts_implementation": implementation}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32, **options)
            model(tokens())
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            if implementation == "omnigene_fast":
                raise
            pytest.skip(f"bitsandbytes does not load a model in 4 bits here: {error}")
        if implementation == "omnigene_fast":
            omnigene_fast.accelerate(model)
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **RECIPES["lora on experts"])
        models.append(peft.get_peft_model(model, config).train())
    assert type(moe_layers(models[0])[0].router.proj).__name__ == "Linear4bit"  # PEFT's, around bitsandbytes'
    assert_same_step(*models)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full", "lora on experts"])
def test_compiled_training_step(recipe):
    torch._dynamo.reset()
    ours, stock = pair(recipe, changes={"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    expected_loss, expected = train_step(stock)
    assert relative_error(loss.detach(), expected_loss) < 1e-5
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, expected[name]) < 1e-4, name


def test_inductor():
    torch._dynamo.reset()
    layer = moe_layers(omnigene_fast.accelerate(helpers.gemma4()))[0]

    def moe(hidden):
        _, weights, index = layer.router(hidden)
        return layer.experts(hidden, index, weights)

    hidden, results = torch.randn(9, HIDDEN, requires_grad=True), []
    for call in (moe, torch.compile(moe, fullgraph=True)):
        out = call(hidden)
        results.append([out, *torch.autograd.grad(out.square().sum(), [hidden, *layer.router.parameters()])])
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine.detach(), expected.detach()) < 1e-5
