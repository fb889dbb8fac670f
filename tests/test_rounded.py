"""Experts stored in 8 bits under tools that read and edit weights: they see weights, and what they write is rounded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import omnigene_fast
from omnigene_fast import lowbit
from omnigene_fast.integrations import lowbit as storage
from omnigene_fast.integrations import rounded

from . import helpers
from .test_lowbit import accelerate, formats, logits, moe_layers, relative_error


def experts_of(model):
    return moe_layers(model)[0].experts


def stored_of(model):
    return [part.clone() for part in storage.stored(experts_of(model), "down_proj")]


def same(one, other):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


EDITS = {
    "copy of a projection": lambda w: w.copy_(w.float() - 0.1 * w.float().mean(-1, keepdim=True)),
    "data": lambda w: w.data.mul_(0.5),
    "data is set": lambda w: setattr(w, "data", w.float() * 3),
    "an expert": lambda w: w[3].mul_(2.0),
    "an expert by assignment": lambda w: w.__setitem__(3, w[4] + w[5]),
    "a row": lambda w: w[2, 7].zero_(),
    "rows by index": lambda w: w.__setitem__((slice(None), [1, 2]), 0.25),
    "columns by assignment": lambda w: w.__setitem__((..., 1), 0.0),
    "augmented": lambda w: w.__setitem__(1, w[1].__imul__(-1)),
    "lerp": lambda w: w.lerp_(torch.ones_like(w, dtype=torch.float32), 0.25),
    "add of another": lambda w: w.add_(w.flip(0), alpha=0.5),
    "foreach": lambda w: torch._foreach_mul_([w.data], 0.75),
    "clamp": lambda w: w.clamp_(-0.05, 0.05),
    "mask": lambda w: w.masked_fill_(w.abs() < 0.02, 0.0),
    "initialised": lambda w: nn.init.normal_(w, generator=torch.Generator().manual_seed(0)),
    "each expert": lambda w: [expert.mul_(0.5) for expert in w],
    "divided": lambda w: w.__itruediv__(4),
    "a chunk": lambda w: w.chunk(2)[1].mul_(1.5),
}


@formats
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_that_of_the_weights_rounded(format, edit):
    model = accelerate(helpers.gemma4(), format)
    parameter = experts_of(model).down_proj
    weights = nn.Parameter(lowbit.dequantise(*stored_of(model), torch.float32), requires_grad=False)
    before = stored_of(model)
    with torch.no_grad():
        edit(parameter)
        edit(weights)
    expected = lowbit.quantise(weights.detach(), format)
    changed = (weights != lowbit.dequantise(*before, torch.float32)).any(-1)
    assert changed.any()
    for got, want, old in zip(stored_of(model), expected, before, strict=True):
        got, want, old = (one.view(torch.uint8) if one.dim() == 3 else one for one in (got, want, old))
        assert torch.equal(got[changed], want[changed])
        assert torch.equal(got[~changed], old[~changed])
    assert experts_of(model).down_proj is parameter
    logits(model)


@formats
def test_what_tools_read_are_weights(format):
    model = accelerate(helpers.gemma4(), format)
    w = experts_of(model).down_proj
    truth = lowbit.dequantise(*stored_of(model), torch.float32)
    x = torch.randn(5, truth.shape[-1])
    for got, want in (
        (w.float(), truth),
        (w.to(torch.bfloat16), truth.bfloat16()),
        (w + 0, truth),
        (w[2], truth[2]),
        (w[:, 1:3].abs().sum(-1), truth[:, 1:3].abs().sum(-1)),
        (w.detach().clone(), truth),
        (w.data.norm(), truth.norm()),
        (w.mT @ torch.ones(truth.shape[1]), truth.mT @ torch.ones(truth.shape[1])),
        (torch.einsum("tk,enk->etn", x, w), torch.einsum("tk,enk->etn", x, truth)),
        (nn.functional.linear(x, w[0]), nn.functional.linear(x, truth[0])),
        (torch.stack([*w.unbind()]), truth),
        (torch.linalg.svdvals(w[0]), torch.linalg.svdvals(truth[0])),
        (w.flatten(), truth.flatten()),
        (w.numpy(force=True), truth),
    ):
        assert torch.allclose(torch.as_tensor(got), want, atol=1e-5)
    assert f"{float(truth[0, 0, 0]):.4f}"[:5] in repr(w)


@formats
@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.999), get_swa_multi_avg_fn(), None])
def test_averages_of_equal_weights_are_these_weights(format, average):
    model = accelerate(helpers.gemma4(), format)
    first = logits(model)
    ema = AveragedModel(model, multi_avg_fn=average)
    shadows = [p.clone().detach() for p in model.parameters()]
    for _ in range(50):
        ema.update_parameters(model)
        for shadow, p in zip(shadows, model.parameters(), strict=True):
            shadow.sub_(0.01 * (shadow - p))
    assert relative_error(logits(ema.module), first) < 1e-4
    with torch.no_grad():
        for shadow, p in zip(shadows, model.parameters(), strict=True):
            p.copy_(shadow)
    assert relative_error(logits(model), first) < 1e-4


@formats
def test_an_average_of_two_models_is_that_of_their_weights(format):
    one, other = accelerate(helpers.gemma4(), format), accelerate(helpers.gemma4(), format)
    with torch.no_grad():
        experts_of(other).down_proj.mul_(3.0)
    truth = 0.75 * lowbit.dequantise(*stored_of(one), torch.float32)
    truth += 0.25 * lowbit.dequantise(*stored_of(other), torch.float32)
    ema = AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    ema.update_parameters(one)
    ema.update_parameters(other)
    assert (
        same(stored_of(ema.module), lowbit.quantise(truth, format))
        or relative_error(
            lowbit.dequantise(*stored_of(ema.module), torch.float32),
            lowbit.dequantise(*lowbit.quantise(truth, format), torch.float32),
        )
        < 1e-3
    )


@formats
def test_a_state_dict_that_was_merged_is_rounded_when_it_is_loaded(format):
    model, other = accelerate(helpers.gemma4(), format), helpers.gemma4()
    merged = {name: (value + other.state_dict()[name]) / 2 for name, value in model.state_dict().items()}
    model.load_state_dict(merged)
    name = "model.layers.0.experts.down_proj"
    assert same(stored_of(model), lowbit.quantise(merged[name], format))


def test_copies_are_weights_where_they_stand_alone_and_bits_within_their_module():
    model = accelerate(helpers.gemma4(), "int8")
    parameter = experts_of(model).down_proj
    assert isinstance(copy.deepcopy(model).model.layers[0].experts.down_proj, rounded.RoundedParameter)
    alone = copy.deepcopy(parameter)
    assert type(alone) is nn.Parameter
    assert torch.equal(alone, lowbit.dequantise(*stored_of(model), torch.float32))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        experts_of(twin).down_proj.zero_()
    assert experts_of(model).down_proj.abs().sum() > 0
    assert relative_error(logits(twin), logits(model)) > 0.01


def test_what_cannot_be_written_says_why():
    model = accelerate(helpers.gemma4(), "int8")
    parameter, before = experts_of(model).down_proj, stored_of(model)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="expected whole rows to be written"):
            parameter[:, :, 2:5].zero_()
        with pytest.raises(RuntimeError, match="expected whole rows to be written"):
            parameter.mT[0].zero_()
        with pytest.raises(ValueError, match="expected finite numbers to store in int8"):
            parameter.mul_(float("nan"))
        with pytest.raises(RuntimeError, match="beside weights stored in int8"):
            torch.ones(2, parameter.shape[-1]).to(parameter.dtype) @ parameter[0].mT
        with pytest.raises(ValueError, match="expected weights of shape"):
            parameter.data = torch.zeros(3)
    assert same(stored_of(model), before)


def test_a_mask_in_the_dtype_of_the_bits_is_refused():
    model = accelerate(helpers.gemma4(), "int8")
    with pytest.raises(RuntimeError, match="beside weights stored in int8"):
        prune.l1_unstructured(experts_of(model), "down_proj", amount=0.5)


def test_restored_parameters_are_plain():
    model = accelerate(helpers.gemma4(), "int8")
    omnigene_fast.restore(model)
    assert type(experts_of(model).down_proj) is nn.Parameter
    assert not any(name.startswith("_omnigene_fast") for name in experts_of(model).__dict__)
