"""Experts stored in 8 bits: the rounding, the model that holds them, its files, and LoRA on top."""

import copy
import io
import math
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import omnigene_fast
from omnigene_fast import analysis, demo, lowbit, ops
from omnigene_fast.demo.model import encode_bytes, load_texts, small_model
from omnigene_fast.integrations import lowbit as storage
from omnigene_fast.integrations import peft as peft_module

from . import helpers
from .helpers import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    allocations,
    assert_as_accurate,
    moe_layers,
    relative_error,
    tokens,
)
from .test_integration import snapshot
from .test_peft import ORDERS, WEIGHT_BYTES, adapt, assert_same_step, config, train_step

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
FORMATS = list(lowbit.FORMATS)
BACKENDS = ["reference", "cpu", "auto"]
DEFAULT = BACKENDS[-1]

restore = omnigene_fast.restore
formats = pytest.mark.parametrize("format", FORMATS)


def accelerate(model, format=None, backend=DEFAULT, **options):
    return omnigene_fast.accelerate(model, experts_dtype=format, backend=backend, **options)


@torch.no_grad()
def logits(model, **inputs):
    return model(**({"input_ids": tokens()} | inputs)).logits


def exact(model):
    """A float64 model with the very weights that `model` stands for: float(stored) * scale, never rounded again."""
    twin = restore(copy.deepcopy(model).double())
    twin.set_experts_implementation("eager")
    return twin


def contents(model):
    """The bits of every experts module: stored projections and scales."""
    return [
        tensor.clone()
        for module in model.modules()
        if storage.bits(module) is not None
        for name in storage.PROJECTIONS
        for tensor in storage.stored(module, name)
    ]


def same_bits(ones, others):
    return all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(ones, others, strict=True)
    )


# --- rounding ---------------------------------------------------------------------------------------------------------


def uneven(dtype=F32, E=3, rows=10, columns=33):
    """Weights whose rows differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, rows, dtype=F64)[:, None]
    return (torch.randn(E, rows, columns, generator=generator, dtype=F64) * sizes).to(dtype)


def assert_within_the_format(stored, scale, weight, format):
    """Every value of the 8-bit form is as near as the format allows."""
    value, truth = stored.double() * scale.double()[..., None], weight.double()
    step = truth.abs().amax(-1, keepdim=True) / lowbit.FORMATS[format][1]
    allowed = step / 2 if format == "int8" else torch.maximum(truth.abs() / 16, step / 1024)
    assert ((value - truth).abs() <= allowed * (1 + 1e-5)).all(), "further than half a step"


@formats
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_value_is_within_half_a_step(format, dtype):
    weight = uneven(dtype)
    stored, scale = lowbit.quantise(weight, format)
    assert (stored.dtype, scale.dtype) == (lowbit.FORMATS[format][0], F32)
    assert_within_the_format(stored, scale, weight, format)
    largest = stored.double().abs().amax(-1)
    assert (largest == lowbit.FORMATS[format][1]).all(), "a row does not reach the end of the format"
    assert torch.equal(scale, (weight.double().abs().amax(-1).float() / lowbit.FORMATS[format][1]))
    back = lowbit.dequantise(stored, scale, dtype)
    assert torch.equal(back, (stored.to(F64) * scale.to(F64)[..., None]).to(F32 if dtype != F64 else F64).to(dtype))


@formats
@pytest.mark.parametrize("mistake", ["one scale", "truncated", "next row's scale"])
def test_the_bound_rejects(format, mistake):
    weight = uneven()
    scale = lowbit.row_scales(weight, format)
    if mistake == "one scale":
        scale = scale.amax().expand(scale.shape).contiguous()
    stored = lowbit.round_rows(weight, scale, format)
    if mistake == "truncated":
        bits = lowbit.round_rows(weight * (1 - 0.06), scale, format)
        stored = torch.where(stored.float().abs() > bits.float().abs(), bits.float(), stored.float())
    elif mistake == "next row's scale":
        scale = scale.roll(1, 1)
    with pytest.raises(AssertionError, match="half a step"):
        assert_within_the_format(stored, scale, weight, format)


def test_ties_go_to_the_even_neighbour():
    row = torch.tensor([[[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]]])
    assert lowbit.quantise(row, "int8")[0].tolist() == [[[127, 0, 2, 2, 0, -2, -127]]]
    row = torch.tensor([[[448, 1.0625, 1.1875, -1.0625, -1.1875]]])  # e4m3 has 1, 1.125, 1.25 there
    assert lowbit.quantise(row, "fp8")[0].float().tolist() == [[[448, 1, 1.25, -1, -1.25]]]


@formats
def test_zeros_and_the_ends_of_the_dtypes(format):
    weight = torch.zeros(2, 4, 5)
    weight[0, 1, 2] = 1e-45  # its scale is 0 in float32
    weight[0, 2] = 0.999 * torch.finfo(F32).max * torch.tensor([1, -1, 0.5, 0, 1e-10])
    stored, scale = lowbit.quantise(weight, format)
    assert (scale[1] == 1).all()
    assert scale.isfinite().all()
    back = lowbit.dequantise(stored, scale, F32)
    assert back.isfinite().all()
    assert (back[1] == 0).all()
    assert relative_error(back[0, 2], weight[0, 2]) < 0.04
    for dtype in (torch.float16, BF16):
        ends = torch.tensor([[[1.0, -1.0]]], dtype=dtype) * torch.finfo(dtype).max
        assert torch.equal(lowbit.dequantise(*lowbit.quantise(ends, format), dtype), ends)


@formats
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(format, value):
    weight = uneven()
    weight[1, 3, 4] = value
    with pytest.raises(ValueError, match=r"^weight: expected finite numbers .* got NaN or infinity in expert 1\.$"):
        lowbit.quantise(weight, format)
    with pytest.raises(ValueError, match="expert 2"):
        lowbit.quantise(torch.tensor([1.0, 1.0, 1e300], dtype=F64)[:, None, None], format)


def test_a_weight_whose_8_bit_form_would_be_infinite_is_refused():
    """127 * (amax / 127) rounds up, beyond the largest float32."""
    with pytest.raises(ValueError, match="got NaN or infinity in expert 0"):
        lowbit.quantise(torch.full((1, 1, 1), torch.finfo(F32).max), "int8")


@formats
def test_layout_does_not_matter_and_nothing_large_is_copied(format):
    weight = uneven(E=40, rows=20)
    apart = torch.stack([weight, weight], -1)[..., 0]
    assert not apart.is_contiguous()
    assert same_bits(lowbit.quantise(weight, format), lowbit.quantise(apart, format))
    assert same_bits(lowbit.quantise(weight, format), lowbit.quantise(weight.clone(), format))
    with allocations() as sizes:
        lowbit.quantise(weight, format)
    assert max(sizes) == weight.numel()  # the 8 bits


@formats
def test_tensors_without_data(format):
    stored, scale = lowbit.quantise(torch.empty(3, 4, 5, device="meta"), format)
    assert (stored.shape, scale.shape, stored.device.type) == ((3, 4, 5), (3, 4), "meta")
    with FakeTensorMode():
        stored, scale = lowbit.quantise(torch.empty(3, 4, 5, dtype=BF16), format)
        assert lowbit.dequantise(stored, scale, BF16).dtype == BF16


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^format: expected 'int8' or 'fp8', got 'int4'\.$"):
        lowbit.quantise(uneven(), "int4")
    with pytest.raises(ValueError, match=r"^weight: expected \[E, rows, columns\], got shape \[2, 2\]"):
        lowbit.quantise(torch.ones(2, 2), "int8")
    with pytest.raises(TypeError, match=r"^weight: expected dtype"):
        lowbit.quantise(torch.ones(2, 2, 2, dtype=torch.int8), "int8")
    stored, scale = lowbit.quantise(uneven(), "int8")
    with pytest.raises(ValueError, match=r"^scale: expected shape \[3, 10\], got \[3, 9\]"):
        lowbit.dequantise(stored, scale[:, 1:], F32)
    with pytest.raises(TypeError, match=r"^dtype: expected float32, .* got torch\.int8"):
        lowbit.dequantise(stored, scale, torch.int8)


# --- what the rounding does to a model --------------------------------------------------------------------------------

# Of a model that behaves like a trained one, in float32: the relative error of the logits, and the share of tokens
# whose set of experts differs from that of the unrounded model, averaged over the layers behind the first. Measured
# 0.007 and 0.02 (int8), 0.022 and 0.08 (fp8), 0.09 and 0.3 (4 bits); bfloat16 itself costs 0.016 and 0.06.
BOUNDS = {"int8": (0.015, 0.05), "fp8": (0.04, 0.16)}


@pytest.fixture(scope="module")
def texts():
    return encode_bytes([text[:80] for family in load_texts(2).values() for text in family], 48)


@pytest.fixture(scope="module")
def trained_like():
    size = demo.Size(H=128, I=48, E=32, K=8, layers=4, texts=2, length=48, rounds=1)
    model = small_model(size, torch.device("cpu"))[0].float()
    model.set_experts_implementation("eager")
    return model


def observed(model, texts, path):
    """The logits of the texts' tokens, and an opened trace of their routes."""
    with omnigene_fast.trace(model, path), torch.no_grad():
        out = model(input_ids=texts.ids, attention_mask=texts.mask).logits
    return out[texts.mask.bool()], omnigene_fast.open_trace(path)


def rounded_by_hand(model, levels, dim):
    """Symmetric rounding of the experts to `levels` on each side, one scale per row or (dim=None) per tensor."""
    for layer in moe_layers(model):
        for name in storage.PROJECTIONS:
            weight = getattr(layer.experts, name).data
            scale = (weight.abs().amax() if dim is None else weight.abs().amax(dim, keepdim=True)) / levels
            weight.copy_((weight / scale).round() * scale)
    return model


@pytest.fixture(scope="module")
def unrounded(trained_like, texts, tmp_path_factory):
    return observed(accelerate(copy.deepcopy(trained_like)), texts, tmp_path_factory.mktemp("unrounded") / "run")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", [*FORMATS, "4 bits"])
def test_logits_and_routes_are_within_the_stated_bounds(
    format, backend, trained_like, texts, unrounded, tmp_path, record_property
):
    model = copy.deepcopy(trained_like)
    model = rounded_by_hand(accelerate(model), 7, -1) if format == "4 bits" else accelerate(model, format, backend)
    out, run = observed(model, texts, tmp_path / "run")
    distance = analysis.replay_distance(unrounded[1], run)
    error, flips = relative_error(out, unrounded[0]), float(distance["differing"][1:].mean())
    record_property("error", error)
    record_property("flips", flips)
    assert distance["differing"][0] == 0, "the first router sees no expert"
    if format == "4 bits":
        assert all(error > bound[0] and flips > bound[1] for bound in BOUNDS.values()), "a control that shows nothing"
    else:
        assert error < BOUNDS[format][0], error
        assert flips < BOUNDS[format][1], flips
        assert error > 1e-4, "nothing was rounded"


@formats
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_the_two_roundings_add_up(format, backend, trained_like, texts, unrounded):
    """As independent errors do: nothing but the rounding to 8 bits comes on top of bfloat16's own."""
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    kept, truth = texts.mask.bool(), unrounded[0]
    wide = relative_error(logits(accelerate(copy.deepcopy(trained_like), format), **inputs)[kept], truth)
    half = copy.deepcopy(trained_like).bfloat16()
    plain = relative_error(logits(half, **inputs)[kept], truth)
    both = relative_error(logits(accelerate(half, format, backend), **inputs)[kept], truth)
    assert both < 1.25 * math.hypot(wide, plain)
    assert 1.25 * math.hypot(wide, plain) < 0.09, "4 bits would pass"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@formats
def test_the_8_bit_model_computes_with_its_weights(format, dtype, backend):
    """Against the stock model with the same rounded weights, in its own bound."""
    model = accelerate(helpers.gemma4(dtype), format, backend)
    stock = restore(copy.deepcopy(model))
    stock.set_experts_implementation("eager")
    assert_as_accurate(logits(model), logits(stock), logits(exact(model)))
    if dtype == BF16:
        return  # its bound has room for a mistake in one layer
    scale = storage.stored(moe_layers(model)[1].experts, "down_proj")[1]
    scale.copy_(scale.roll(1, 1))
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_accurate(logits(model), logits(stock), logits(exact(stock)))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_other_families(family):
    model = accelerate(getattr(helpers, family)(), "int8")
    assert_as_accurate(logits(model), logits(restore(copy.deepcopy(model))), logits(exact(model)))


# --- what changes in the model ----------------------------------------------------------------------------------------


@formats
def test_names_objects_and_keys_stay_and_the_bytes_are_halved(format):
    model = helpers.gemma4(BF16)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys, modules = list(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    experts = [p for name, p in model.named_parameters() if "experts." in name]
    before = sum(p.nbytes for p in experts)
    accelerate(model, format)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert len(experts) == 6
    assert sum(p.untyped_storage().nbytes() for p in experts) == before // 2
    assert not any(p.requires_grad or p.is_floating_point() for p in experts)
    assert all(p.requires_grad for name, p in model.named_parameters() if "experts." not in name)
    assert model.dtype == BF16


@formats
def test_casts_change_the_dtype_of_the_computation_only(format):
    model = accelerate(helpers.gemma4(), format)
    bits, expected = contents(model), logits(model)
    for cast, dtype in (
        (model.double, F64),
        (model.half, torch.float16),
        (lambda: model.to(BF16), BF16),
        (model.float, F32),
    ):
        cast()
        assert same_bits(contents(model), bits)
        assert {storage.compute_dtype(layer.experts) for layer in moe_layers(model)} == {dtype}
        assert model.state_dict()["model.layers.0.experts.down_proj"].dtype == dtype
        assert logits(model).dtype == dtype
    assert relative_error(logits(accelerate(helpers.gemma4(), format).double()), expected) < 1e-4
    meta = model.to("meta")
    assert meta(tokens().to("meta")).logits.shape == (2, 24, helpers.VOCAB)


@pytest.mark.parametrize("weights", [F32, BF16])
def test_autocast(weights):
    model = accelerate(helpers.gemma4(weights), "int8")
    stock = restore(copy.deepcopy(model))
    stock.set_experts_implementation("eager")
    with torch.autocast("cpu", BF16):
        out, expected = logits(model), logits(stock)
    assert out.dtype == expected.dtype
    assert_as_accurate(out, expected, logits(exact(model)))


@formats
def test_fake_tensors_can_be_stored(format):
    with FakeTensorMode():
        model = accelerate(transformers.Gemma4ForCausalLM(helpers.text_config()), format)
        experts = moe_layers(model)[0].experts
        assert storage.stored(experts, "down_proj")[0].dtype == lowbit.FORMATS[format][0]


def test_a_second_call_keeps_what_is_stored(caplog):
    model = accelerate(helpers.gemma4(), "int8")
    bits, before = contents(model), snapshot(model)
    accelerate(model)
    accelerate(model, "int8")
    assert same_bits(contents(model), bits)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"^experts_dtype: expected 'int8', .* got 'fp8'; call omnigene_fast\.restore"):
        accelerate(model, "fp8", numerics="fp32")
    assert snapshot(model) == before
    assert moe_layers(model)[0].router.forward.keywords["numerics"] == "hf"
    assert caplog.text == ""


def test_another_implementation_is_no_silent_garbage():
    """Eager reads the weights; the others cast their input to the parameter's dtype, that of the bits."""
    model = accelerate(helpers.gemma4(), "int8")
    fast = logits(model)
    model.set_experts_implementation("eager")
    assert relative_error(logits(model), fast) < 1e-5
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match=r"such as by weight\.float"):
        logits(model)


@pytest.mark.parametrize("order", ["hooks first", "accelerate first"])
def test_device_hooks_of_the_accelerate_library(order):
    """Hooks that only move the inputs are served; offloading, which reads the state dict, is not."""
    from accelerate import cpu_offload, dispatch_model

    model = helpers.gemma4()
    if order == "accelerate first":
        accelerate(model, "int8")
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if order == "hooks first":
        accelerate(model, "int8")
    assert relative_error(logits(model), logits(accelerate(helpers.gemma4(), "int8"))) < 1e-5
    offloaded = helpers.gemma4() if order == "hooks first" else accelerate(helpers.gemma4(), "int8")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="load it with device_map='cpu', call accelerate"):
        logits(accelerate(offloaded, "int8"))


# --- what cannot be stored --------------------------------------------------------------------------------------------


def _nan(model):
    moe_layers(model)[2].experts.down_proj.data[5, 3, 2] = math.nan


def _gradient(model):
    model(tokens(), labels=tokens()).loss.backward()


def _parametrised(model):
    parametrize.register_parametrization(moe_layers(model)[1].experts, "down_proj", nn.Identity())


def _subclass(model):
    class Params4bit(torch.Tensor):
        pass

    experts = moe_layers(model)[1].experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Params4bit))


def _shared(model):
    first, _, last = moe_layers(model)
    last.experts.down_proj = first.experts.down_proj


def _offloaded(model):
    experts = moe_layers(model)[1].experts
    experts.to("meta")
    experts._hf_hook = None


def _low(model):
    experts = moe_layers(model)[2].experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


@formats
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            _nan,
            r"^model: .* got NaN or infinity in model\.layers\.2\.experts\.down_proj, expert 5; load the checkpoint",
        ),
        (_gradient, r"model\.layers\.0\.experts\.gate_up_proj, which is being trained .* before training"),
        (_parametrised, r"model\.layers\.1\.experts\.down_proj, which is parametrised; remove"),
        (_subclass, r"layers\.1\.experts\.down_proj, which is a Params4bit .* before that tool"),
        (_shared, r"layers\.2\.experts\.down_proj, which is one parameter with model\.layers\.0\.experts\.down_proj;"),
        (_offloaded, r"layers\.1\.experts\.gate_up_proj, which is offloaded"),
        (_low, r"layers\.2\.experts\.down_proj, which is stored as torch\.float8_e4m3fn; load"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(format, spoil, sentence):
    model = helpers.gemma4()
    spoil(model)
    before = snapshot(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        accelerate(model, format)
    assert snapshot(model) == before
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert tensor.device.type == "meta" or torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), (
            name
        )
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point() and p.dtype == F32)


def test_an_unknown_format_is_named():
    model = helpers.gemma4()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^experts_dtype: expected 'int8' or 'fp8', got 'int4'\.$"):
        accelerate(model, "int4")
    assert snapshot(model) == before


def test_memory_that_runs_out_half_way_leaves_a_model_that_runs(monkeypatch):
    model, whole = helpers.gemma4(), accelerate(helpers.gemma4(), "int8")
    original, seen = lowbit.round_rows, []

    def failing(*args):
        seen.append(args)
        if len(seen) == 4:  # the second projection of the second layer
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(lowbit, "round_rows", failing)
    with pytest.raises(MemoryError):
        accelerate(model, "int8")
    assert [storage.bits(layer.experts) is not None for layer in moe_layers(model)] == [True, False, False]
    assert logits(model).isfinite().all()
    accelerate(model, "int8")
    assert torch.equal(logits(model), logits(whole))


# --- restore ----------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_restore_gives_plain_weights_with_the_rounding(format, dtype, caplog):
    model = helpers.gemma4(dtype)
    moe_layers(model)[1].experts.down_proj.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before, unrounded = snapshot(model), logits(model)
    accelerate(model, format)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert restore(model) is model
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"keep the rounding of {format}" in caplog.text
    assert snapshot(model) == before
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert not list(moe_layers(model)[0].experts.buffers())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert 1e-4 < relative_error(logits(model), unrounded) < 0.2
    restore(model)
    assert len(caplog.records) == 1
    assert storage.bits(moe_layers(accelerate(model, FORMATS[1 - FORMATS.index(format)]))[0].experts) is not None


# --- copies and files -------------------------------------------------------------------------------------------------


def _torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _torch_save])
@formats
def test_a_copy_has_its_own_8_bits(format, duplicate):
    model = accelerate(helpers.gemma4(), format)
    expected = logits(model)
    twin = duplicate(model)
    other = helpers.gemma4(seed=7)
    model.load_state_dict(other.state_dict())  # by hooks, which the copy has of its own
    assert torch.equal(logits(twin), expected)
    assert relative_error(logits(model), expected) > 0.1
    twin.load_state_dict(other.state_dict())
    assert same_bits(contents(twin), contents(model))
    assert not moe_layers(restore(twin))[0].experts._load_state_dict_pre_hooks
    assert moe_layers(model)[0].experts._load_state_dict_pre_hooks


@formats
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_save_pretrained_writes_a_stock_checkpoint(format, dtype, shard, tmp_path):
    model = accelerate(helpers.gemma4(dtype), format)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard == "60KB")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert {p.dtype for p in stock.parameters()} == {dtype}
    state = model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert_as_accurate(logits(model), logits(stock), logits(exact(model)))
    assert relative_error(logits(stock), logits(helpers.gemma4(dtype))) > 1e-4, "the checkpoint is not rounded"


def test_families_whose_checkpoints_have_other_keys(tmp_path):
    """transformers splits the experts of Qwen3-MoE into one tensor each when it saves."""
    model = accelerate(helpers.qwen3_moe(), "int8")
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(stock), logits(model)) < 1e-5


@formats
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_loading_floating_weights_rounds_them(format, assign, dtype):
    model, other = accelerate(helpers.gemma4(dtype), format), helpers.gemma4(dtype, seed=3)
    state = other.state_dict()
    kept = {name: (tensor, tensor.clone()) for name, tensor in state.items()}
    model.load_state_dict(state, assign=assign)
    assert all(torch.equal(*pair) and state[name] is pair[0] for name, pair in kept.items()), "the caller's changed"
    assert same_bits(contents(model), contents(accelerate(other, format)))
    assert torch.equal(logits(model), logits(other))


@formats
def test_its_own_state_dict_comes_back(format):
    model = accelerate(helpers.gemma4(BF16), format)
    expected, bits = logits(model), contents(model)
    model.load_state_dict(model.state_dict())
    assert relative_error(logits(model), expected) < 2e-2  # the weights were rounded to bfloat16 in between
    stored = zip(contents(model)[::2], bits[::2], strict=True)
    assert max(relative_error(a.float(), b.float()) for a, b in stored) < 1e-2


def test_what_cannot_be_loaded_is_named():
    model = accelerate(helpers.gemma4(), "int8")
    bits = contents(model)
    key = "model.layers.1.experts.down_proj"
    state = model.state_dict()
    spoilt = state[key].clone()
    spoilt[2, 0, 0] = math.inf
    for wrong, sentence in (
        (spoilt, rf"{key}: weight: expected finite numbers .* expert 2"),
        (spoilt[1:], "size mismatch for model.layers.1.experts.down_proj"),
        (spoilt.to(torch.int8), rf"{key}: weight: expected dtype float32"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            model.load_state_dict(state | {key: wrong})
        assert same_bits(contents(model)[2::4], bits[2::4])
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert same_bits(contents(model)[::2], bits[::2])


# --- LoRA on top ------------------------------------------------------------------------------------------------------


def pair(format, *configs, order="accelerate first", dtype=F32, backend=DEFAULT, save="preactivation", **options):
    """A model with experts in 8 bits and a stock one with the same rounded weights, with the same adapters."""
    base = helpers.gemma4(dtype)
    stock = restore(accelerate(copy.deepcopy(base), format))
    stock.set_experts_implementation("eager")
    if order == "accelerate first":
        ours = adapt(accelerate(base, format, backend, save=save), *configs, **options)
    else:
        ours = accelerate(adapt(base, *configs, **options), format, backend, save=save)
    return ours, adapt(stock, *configs, **options)


@formats
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 16])
def test_lora_trains_as_on_the_rounded_weights(format, order, rank, backend):
    ours, stock = pair(format, config(r=rank), order=order, backend=backend)
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {F32}
    assert_same_step(ours, stock)
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["experts.down_proj"]])
def test_lora_on_one_projection_recomputed(order, targets):
    ours, stock = pair("int8", config(targets), order=order, save="input")
    assert_same_step(ours, stock)


@pytest.mark.parametrize("order", ORDERS)
def test_several_adapters(order):
    configs = config(r=4), config(r=1, lora_alpha=3), config(r=9, use_rslora=True)
    ours, stock = pair("int8", *configs, order=order)
    assert_same_step(ours, stock)
    with ours.disable_adapter(), stock.disable_adapter():
        assert relative_error(logits(ours), logits(stock)) < 1e-5
    for model in (ours, stock):
        model.set_adapter("more1")
    assert_same_step(ours, stock)


def test_the_comparison_rejects_a_factor_cast_to_the_weights_dtype(monkeypatch):
    """What PEFT's own `get_delta_factors` would do."""
    ours, stock = pair("int8", config())
    original = peft_module._delta_factors

    def cast(wrapper, adapter, dtype):
        lhs, rhs, scaling = original(wrapper, adapter, dtype)
        return lhs, (rhs * 64).to(torch.int8).to(dtype) / 64, scaling

    monkeypatch.setattr(peft_module, "_delta_factors", cast)
    with pytest.raises(AssertionError):
        assert_same_step(ours, stock)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_bfloat16_base_keeps_float32_factors(order, backend):
    ours, stock = pair("int8", config(r=16), dtype=BF16, order=order, backend=backend)
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {F32}
    loss, gradients = train_step(ours)
    expected_loss, expected = train_step(stock)
    assert relative_error(loss, expected_loss) < 2e-2
    for name, gradient in gradients.items():
        assert gradient.dtype == F32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.9, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    ours, stock = pair("int8", config())
    for model in (ours, stock):
        model.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.train()
    assert_same_step(ours, stock.train())


@pytest.mark.parametrize("order", ORDERS)
def test_merging_brings_the_experts_back_and_adds(order, caplog):
    peft_module._say_that_merging_thaws.cache_clear()
    ours, stock = pair("int8", config(), order=order)
    adapted = logits(ours)
    ours.merge_adapter()
    assert caplog.text.count("Merging an adapter brings the experts") == 1
    assert relative_error(logits(ours), adapted) < 1e-5
    assert not moe_layers(ours)[0].experts.get_base_layer().down_proj.requires_grad
    with pytest.raises(ValueError, match=r"which is merged with the adapter 'default'; call model\.unmerge_adapter"):
        accelerate(ours, "int8")
    ours.unmerge_adapter()
    assert_same_step(ours, stock)
    merged = accelerate(ours, "int8").merge_and_unload()
    assert relative_error(logits(merged), adapted) < 0.05  # rounded twice
    assert all(storage.bits(layer.experts) is None for layer in moe_layers(merged))


def test_merge_and_unload_equals_the_adapter_model():
    ours, stock = pair("fp8", config(["experts.down_proj"]))
    adapted = logits(ours)
    merged, expected = ours.merge_and_unload(), stock.merge_and_unload()
    assert relative_error(logits(merged), adapted) < 1e-5
    for name, tensor in expected.state_dict().items():
        assert relative_error(merged.state_dict()[name], tensor) < 1e-6, name


def test_an_adapter_is_saved_and_loaded(tmp_path):
    ours, stock = pair("int8", config())
    ours.save_pretrained(tmp_path)
    assert set(peft.load_peft_weights(str(tmp_path))) == set(peft.get_peft_model_state_dict(stock))
    again = peft.PeftModel.from_pretrained(accelerate(helpers.gemma4(), "int8"), tmp_path, is_trainable=True)
    assert_same_step(again, stock)


def test_a_restored_peft_model_stays_frozen():
    ours, stock = pair("int8", config())
    restore(ours)
    assert_same_step(ours, stock)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "lora_" not in name)


def test_pefts_own_way_is_refused(monkeypatch):
    ours, _ = pair("int8", config())
    ours.base_model.model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"^model: expected adapters on experts stored in 8 bits .* 'eager'; call"):
        logits(ours)
    ours.base_model.model.set_experts_implementation("omnigene_fast")
    monkeypatch.delattr(peft.tuners.lora.layer.ParamWrapper, "get_delta_factors")
    with pytest.raises(ValueError, match=r"peft>=0\.21"):
        logits(ours)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        ours(tokens(), adapter_names=["default", "default"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weight_is_built_in_a_step(backend):
    """Neither the sum with the adapter nor the floating weights of all experts; the stock model is the control."""
    ours, stock = pair("int8", config(), backend=backend)
    largest = []
    for model in (ours, stock):
        train_step(model)
        with allocations() as sizes:
            train_step(model)
        largest.append(max(sizes))
    assert largest[0] < WEIGHT_BYTES <= largest[1]


def test_storing_allocates_one_layer_and_one_expert():
    model = helpers.gemma4()
    with allocations() as sizes:
        accelerate(model, "int8")
    assert max(sizes) == WEIGHT_BYTES // 4  # the 8 bits of gate_up_proj
    assert sorted(sizes)[-7] <= WEIGHT_BYTES // EXPERTS  # three layers of two projections, then one expert in float32


# --- the surroundings -------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_equals_eager(format, backend):
    model = accelerate(helpers.gemma4(), format)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative_error(logits(compiled), logits(model)) < 1e-6


def test_compiled_experts_with_lora():
    ours, _ = pair("int8", config(), config(r=2))
    experts = moe_layers(ours)[0].experts
    hidden, grad = torch.randn(2, 9, HIDDEN)
    index, weights = helpers.routing("uniform", 9, TOP_K, EXPERTS, seed=0)

    def run():
        experts.zero_grad()
        out = experts(hidden, index, weights)
        out.backward(grad)
        return [out.detach(), *(p.grad for p in experts.parameters() if p.requires_grad)]

    expected = run()
    experts.forward = torch.compile(experts.forward, fullgraph=True, backend="aot_eager")
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(run(), expected, strict=True))


@formats
def test_generate_equals_the_rounded_stock_model(format):
    model = accelerate(helpers.gemma4(), format)
    stock = restore(copy.deepcopy(model))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "no_repeat_ngram_size": 2}
    out = model.generate(tokens(2, 8), **options)
    assert torch.equal(out, stock.generate(tokens(2, 8), **options))
    assert len(set(out[0, 8:].tolist())) > 4


def test_trainer_saves_and_resumes(tmp_path):
    model = peft.get_peft_model(accelerate(helpers.gemma4(), "int8"), config())
    samples = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 24)]  # one batch
    bits = contents(model)

    def train(**options):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=samples)
        trainer.train(**options)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = train()
    assert losses[3] < losses[0]
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[2:] == pytest.approx(losses[2:], rel=1e-5)
    assert same_bits(contents(model), bits)


def test_a_trace_says_how_the_experts_were_stored(tmp_path):
    model = accelerate(helpers.gemma4(), "fp8")
    with omnigene_fast.trace(model, tmp_path / "run"), torch.no_grad():
        model(tokens())
    assert omnigene_fast.open_trace(tmp_path / "run").meta["quantization"] == "experts fp8"
