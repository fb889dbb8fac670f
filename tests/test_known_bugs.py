"""Bugs that shipped elsewhere, each a test here: the operators and the integration.

Those of gradients, training and LoRA are in test_gradients*.py, test_training.py and test_peft.py (`-k bug_` runs all),
those of packaging in test_packaging.py, those of the GPU kernels in tests/kernels. The numbers are those of the
project's list of known bugs.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import omnigene_fast
from omnigene_fast import reference
from omnigene_fast.ops import expert_mlp, route, topk_gate

from . import gradients, helpers
from .helpers import (
    HIDDEN,
    assert_as_accurate,
    assert_same,
    backend_params,
    experts_truth,
    moe_layers,
    relative_error,
    router_arguments,
    routing,
    stock_experts,
    stock_router,
    tokens,
)

F32, BF16 = torch.float32, torch.bfloat16
backends = pytest.mark.parametrize("backend", backend_params())


def run(experts, hidden, index, weights, backend, activation="gelu_tanh", **options):
    parameters = experts.gate_up_proj, experts.down_proj
    return expert_mlp(hidden, *parameters, index, weights, activation=activation, backend=backend, **options)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize("hidden_act", ["silu", "relu", "gelu"])
def test_bug_01_activation_from_config_hidden_act(hidden_act):
    """1: transformers' integrations/sonicmoe.py reads `config.hidden_act`; Gemma-4 has `hidden_activation`."""
    stock = helpers.gemma4()
    ours = copy.deepcopy(stock)
    ours.config.hidden_act = hidden_act
    ours.config.hidden_activation = hidden_act
    assert relative_error(logits(omnigene_fast.accelerate(ours)), logits(stock)) < 1e-5
    moe_layers(ours)[0].experts.act_fn = nn.SiLU()
    assert relative_error(logits(ours), logits(stock)) > 1e-3, "the activation does not follow act_fn"
    moe_layers(ours)[0].experts.act_fn = nn.Softplus()
    with pytest.raises(ValueError, match="its activation is Softplus"):
        logits(ours)


@backends
def test_bug_02_erf_for_tanh_gelu(backend):
    """2: vLLM #41574, #43326, #42822 ran Gemma-4 with erf-GELU: 2e-4 apart, so it takes float32 to see it."""
    experts = stock_experts(16, 67, 35, F32)
    hidden, (index, weights) = torch.randn(65, 67), routing("uniform", 65, 4, 16, seed=0)
    truth = {
        activation: reference.expert_mlp(
            hidden.double(),
            experts.gate_up_proj.double(),
            experts.down_proj.double(),
            index,
            weights,
            activation=activation,
        )
        for activation in ("gelu_tanh", "gelu")
    }
    for activation, other in (("gelu_tanh", "gelu"), ("gelu", "gelu_tanh")):
        out = run(experts, hidden, index, weights, backend, activation)
        assert relative_error(out, truth[activation]) < 1e-6
        assert relative_error(out, truth[other]) > 5e-5


@backends
def test_bug_02_slope_of_erf_for_tanh_gelu(backend):
    """2: the same in the backward, where the two slopes are as far apart."""
    p = gradients.problem()
    truth = {activation: gradients.truth(p, activation=activation) for activation in ("gelu_tanh", "gelu")}
    for activation, other in (("gelu_tanh", "gelu"), ("gelu", "gelu_tanh")):
        mine = gradients.ours(p, backend=backend, activation=activation)
        for name, gradient in mine.items():
            assert relative_error(gradient, truth[activation][name]) < 2e-6, name
            assert relative_error(gradient, truth[other][name]) > 5e-5, name


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_bug_03_small_values_under_an_absolute_tolerance(magnitude, dtype, backend):
    """3: SonicMoE #2, #63 passed tests at values ~1e-5 with atol 1.4e-2: the criterion here is relative."""
    experts = stock_experts(16, 96, 40, dtype)
    index, weights = routing("uniform", 129, 4, 16, seed=0)
    hidden = (torch.randn(129, 96) * magnitude).to(dtype)
    truth, stock = experts_truth(experts, hidden, index, weights), experts(hidden, index, weights)
    assert_as_accurate(run(experts, hidden, index, weights, backend), stock, truth)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_accurate(torch.zeros_like(hidden), stock, truth)


@backends
@pytest.mark.parametrize("T", [31, 32, 33, 63, 65, 97])
def test_bug_05_tails_and_strides(T, backend):
    """5: Liger #1361, #1377: T % 32 tails, and rows packed at another stride than their length."""
    experts = stock_experts(16, 67, 35, F32)
    index, weights = routing("uniform", T, 4, 16, seed=T)
    packed = torch.randn(T, 3 * 67)
    for hidden in (packed[:, 67:134], packed[:, :67]):
        truth = experts_truth(experts, hidden, index, weights)
        assert_as_accurate(run(experts, hidden, index, weights, backend), experts(hidden, index, weights), truth)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_bug_05_extreme_gates_stay_finite(activation, dtype, backend):
    """5: Liger #1398: non-finite values at extreme gates."""
    gate = torch.tensor([-1e4, -100.0, -20.0, -9.0, 0.0, 9.0, 20.0, 100.0, 1e4])
    hidden = gate[:, None].to(dtype)
    gate_up = torch.tensor([[[1.0], [0.0]]], dtype=dtype)  # gate = x, up = 0: act(x) * 0 must be 0, not NaN
    ones = torch.ones(9, 1)
    index = torch.zeros(9, 1, dtype=torch.int64)
    down = torch.ones(1, 1, 1, dtype=dtype)
    out = expert_mlp(hidden, gate_up, down, index, ones, activation=activation, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    one_up = expert_mlp(
        torch.cat([hidden, torch.ones_like(hidden)], 1),
        torch.eye(2, dtype=dtype)[None],
        torch.ones(1, 2, 1, dtype=dtype),
        index,
        ones,
        activation=activation,
        backend=backend,
    )
    expected = reference.ACTIVATIONS[activation](hidden.double())
    assert torch.allclose(one_up[:, :1].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_bug_06_a_synchronisation_in_the_forward():
    """6: Liger calls `.item()` in the forward: here nothing reads data, so fake tensors pass through both halves."""
    layer = moe_layers(omnigene_fast.accelerate(helpers.gemma4()))[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(9, HIDDEN)
        _, weights, index = layer.router(hidden)
        out = layer.experts(hidden, index, weights)
    assert out.shape == (9, HIDDEN)
    assert out.fake_mode is not None


@backends
@pytest.mark.parametrize("T", [0, 1])
def test_bug_08_one_token_or_none(T, backend):
    """8: Liger #1368 hangs at T=1."""
    router, experts = stock_router(16, 4, 67, F32), stock_experts(16, 67, 35, F32)
    hidden = torch.randn(T, 67)
    probabilities, weights, index = route(hidden, **router_arguments(router), backend=backend)
    assert relative_error(probabilities, router(hidden)[0]) < 1e-6
    assert torch.equal(index, router(hidden)[2])
    assert torch.equal(topk_gate(probabilities.log(), router.per_expert_scale, top_k=4, backend=backend)[2], index)
    out = run(experts, hidden, index, weights, backend)
    assert_as_accurate(out, experts(hidden, index, weights), experts_truth(experts, hidden, index, weights))


@backends
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("T", [0, 1, 9])
def test_bugs_09_and_10_schemas_and_fakes(T, K, backend):
    """9: ScatterMoE mutates an undeclared argument. 10: HF `silu-and-mul` has a wrong fake shape in another rank.

    Every operator here has one documented rank per argument; opcheck at the sizes where shapes degenerate.
    """
    router, experts = stock_router(16, K, 67, F32), stock_experts(16, 67, 35, F32)
    hidden = torch.randn(T, 67, requires_grad=True)
    parameters = [p.requires_grad_() for p in (router.proj.weight, router.scale, router.per_expert_scale)]
    probabilities, weights, index = (x.detach() for x in route(hidden, *parameters, top_k=K, eps=1e-6, backend=backend))
    block = [hidden, experts.gate_up_proj, experts.down_proj, index, weights, *[None] * 6]
    kept = torch.ops.omnigene_fast.expert_mlp_fwd(*block, "gelu_tanh", False, True, backend)[1].detach()
    grads, plain = (probabilities, weights), [p.detach() for p in parameters]
    for name, arguments in (
        ("route_fwd", (hidden, *parameters, K, 1e-6, "hf", backend)),
        ("topk_gate_fwd", (torch.randn(T, 16, requires_grad=True), router.per_expert_scale, K, backend)),
        ("expert_mlp_fwd", (*block, "gelu_tanh", False, True, backend)),
        ("route_bwd", (*grads, hidden.detach(), *plain, probabilities, index, 1e-6, [True] * 4, backend)),
        ("topk_gate_bwd", (*grads, probabilities, index, plain[2], F32, [True] * 2, backend)),
        (
            "expert_mlp_bwd",
            (torch.randn(T, 67), hidden.detach(), *block[1:], kept, "gelu_tanh", False, [True] * 8, backend),
        ),
    ):
        op = getattr(torch.ops.omnigene_fast, name).default
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}, name


@backends
@pytest.mark.parametrize("mode", helpers.ROUTINGS)
def test_bug_13_two_runs_two_results(mode, backend):
    """13: Unsloth's pipelined stores, `index_add_`: 20 runs of router and experts, bit for bit."""
    router, experts = stock_router(128, 8, 96, BF16), stock_experts(128, 96, 40, BF16)
    hidden = torch.randn(129, 96).bfloat16()
    index, weights = routing(mode, 129, 8, 128, seed=0)

    def once():
        gate = route(hidden, **router_arguments(router), backend=backend)
        return *gate, run(experts, hidden, index, weights, backend), run(experts, hidden, gate[2], gate[1], backend)

    first = once()
    for _ in range(19):
        assert all(torch.equal(mine, same) for mine, same in zip(once(), first, strict=True))


@pytest.mark.parametrize("on_experts", [False, True])
def test_bug_18_adapter_keys_that_match_nothing(on_experts):
    """18: OmniGene-4's scripts load LoRA tensors by name and skip what they do not find: names must not change."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if on_experts else None
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "router.proj"], target_parameters=parameters, init_lora_weights=False
    )
    stock = peft.get_peft_model(helpers.gemma4(), config)
    for order in ("peft first", "accelerate first"):
        if order == "peft first":
            ours = omnigene_fast.accelerate(peft.get_peft_model(helpers.gemma4(), config))
        else:
            ours = peft.get_peft_model(omnigene_fast.accelerate(helpers.gemma4()), config)
        assert list(ours.state_dict()) == list(stock.state_dict())
        result = ours.load_state_dict(stock.state_dict(), strict=True)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert relative_error(logits(ours), logits(stock)) < 1e-5


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [1, 2, 3, 7])
def test_bug_21_unaligned_tensors(offset, dtype, backend):
    """21: transformers' grouped_mm on the CPU crashes on tensors that do not start at a multiple of 16 bytes."""
    experts, router = stock_experts(16, 67, 35, dtype), stock_router(16, 4, 67, dtype)
    index, weights = routing("uniform", 9, 4, 16, seed=0)

    def moved(x):
        copied = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape).copy_(x)
        assert copied.data_ptr() % 16 == offset * x.element_size() % 16 != 0
        return copied

    hidden = torch.randn(9, 67).to(dtype)
    arguments = (hidden, experts.gate_up_proj, experts.down_proj)
    out = [
        expert_mlp(*tensors, index, weights, activation="gelu_tanh", backend=backend)
        for tensors in (arguments, map(moved, arguments))
    ]
    assert_same(*out, backend)
    arguments = (hidden, router.proj.weight, router.scale, router.per_expert_scale)
    aligned, unaligned = (
        route(*tensors, top_k=4, eps=1e-6, backend=backend) for tensors in (arguments, map(moved, arguments))
    )
    for mine, same in zip(unaligned, aligned, strict=True):
        assert_same(mine, same, backend)


def test_bug_23_no_layer_found_and_no_error():
    """23: plumb-moe finds 0 layers and says nothing."""
    for model in (nn.Sequential(nn.Linear(2, 2)), helpers.gemma4(enable_moe_block=False)):
        with pytest.raises(ValueError, match="with none"):
            omnigene_fast.accelerate(model)


ISA_SCRIPT = """
import torch
from omnigene_fast.backends import cpu
from omnigene_fast.ops import SAVE, route
from omnigene_fast import reference
from tests.gradients import Comparison, ours, problem, stock, truth
from tests.test_gradients_gate import Problem
from tests.test_ops_trace import as_ids, buffers, true_statistics

reason = cpu.unavailable(torch.device("cpu"))
if reason:
    print(reason)
    raise SystemExit
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for save in SAVE:
        p = problem(229, 5, 2, 67, 35, dtype=dtype, rank=(3, 17))
        Comparison().add(ours(p, backend="cpu", save=save), stock(p), truth(p)).check()
    p = Problem(dtype=dtype)
    Comparison().add(p.ours(backend="cpu"), p.stock(), p.truth()).check()
    trace = buffers(len(p.hidden), 4, p.arguments["proj_weight"].shape[0])
    gate = route(p.hidden, **p.arguments, top_k=4, eps=p.eps, backend="cpu", trace=trace)
    assert torch.equal(as_ids(trace.ids), gate[2]), dtype
    assert torch.equal(trace.weights, gate[1].half()), dtype
    assert (trace.stats.double() - true_statistics(gate[0], 4)).abs().max() < 3e-3, dtype
    same = reference.route(p.hidden, **p.arguments, top_k=4, eps=p.eps)
    assert (gate[0] - same[0]).norm() <= 2 * torch.finfo(dtype).eps * same[0].norm(), dtype
print("isa", cpu.isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_bug_34_every_isa_path_runs(isa):
    """34: vLLM and SGLang treat CPUs without AMX as scalar: each path runs by override and names itself."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMNIGENE_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if not done.stdout.startswith("isa "):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == f"isa {isa}"


@pytest.mark.parametrize("wrap", ["lora", "hook"])
def test_bug_38_a_wrapped_projection_read_as_a_weight(wrap):
    """38: a fused router that reads `.weight` of a PEFT or 4-bit module drops the adapter."""
    stock = helpers.gemma4()
    if wrap == "lora":
        config = peft.LoraConfig(r=4, target_modules=["router.proj"], init_lora_weights=False)
        stock = peft.get_peft_model(stock, config)
    else:
        for layer in moe_layers(stock):
            layer.router.proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert relative_error(logits(helpers.gemma4()), logits(stock)) > 1e-2
    assert relative_error(logits(omnigene_fast.accelerate(copy.deepcopy(stock))), logits(stock)) < 1e-5


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bug_39_sentinels_enter_the_product(dtype, backend):
    """39: FSDP/EP ranks mark picks of other ranks with id == E; NaN weights there must not matter."""
    experts = stock_experts(16, 67, 35, dtype)
    hidden, (index, weights) = torch.randn(33, 67).to(dtype), routing("uniform", 33, 4, 16, seed=0)
    expected = run(experts, hidden, index, weights.masked_fill(index >= 8, 0.0), backend)
    local = torch.where(index >= 8, 16, index)
    out = run(experts, hidden, local, weights.masked_fill(index >= 8, math.nan), backend, expert_parallel=True)
    assert torch.equal(out, expected)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_bug_40_a_fused_router_that_routes_differently(dtype, backend):
    """40: Megatron-Bridge #4683: every top-8 set of 4096 tokens equals the stock router's, but for last-place ties."""
    router = stock_router(128, 8, 96, dtype)
    hidden = torch.randn(4096, 96).to(dtype)
    index = route(hidden, **router_arguments(router), backend=backend)[2].sort(-1).values
    differs = (index != router(hidden)[2].sort(-1).values).any(-1)
    logits = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)[differs].sort(-1).values.double()
    eighth, ninth = logits[:, -8], logits[:, -9]
    ulp = torch.finfo(dtype).eps * torch.exp2(eighth.abs().log2().floor())
    assert (eighth - ninth <= ulp).all()
    fp32 = route(hidden, **router_arguments(router), numerics="fp32", backend=backend)[2].sort(-1).values
    if dtype == BF16:
        assert (fp32 != index).any(-1).float().mean() > 0.005, "the test could not tell another routing"
        assert differs.float().mean() < (fp32 != index).any(-1).float().mean()
