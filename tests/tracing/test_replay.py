"""Replay: the recorded experts in their recorded order, the weights of the live router, each record used once."""

import copy

import pytest
import torch

import omnigene_fast
from omnigene_fast import reference
from omnigene_fast.tracing.replay import reroute

from ..helpers import EXPERTS, TOP_K, backend_params, gemma4, moe_layers, relative_error, tokens
from .test_capture import Routers, padded_batch, prepared

backends = pytest.mark.parametrize("backend", ["stock", *backend_params()])


def recorded(model, path, *calls, **options):
    out = []
    with torch.no_grad(), omnigene_fast.trace(model, path, record=("ids",), **options):
        for call in calls:
            out.append(model(**call).logits)
    return out


def perturbed(model, scale=0.3):
    """The same model after some training, as it were: its router would choose other experts."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moe_layers(other):
            layer.router.proj.weight.add_(torch.randn_like(layer.router.proj.weight) * scale)
    return other


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_31_the_recorded_order_gives_the_same_bits(backend, dtype, tmp_path):
    """31: slime replayed in another order, which changes sums in bfloat16."""
    model = gemma4(dtype)
    if backend != "stock":
        omnigene_fast.accelerate(model, backend=backend)
    ids, mask = padded_batch()
    call = {"input_ids": ids, "attention_mask": mask}
    logits = recorded(model, tmp_path / "run", call)[0]
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run") as again:
        assert torch.equal(model(**call).logits, logits)
    assert (again.consumed, again.remaining, again.recomputed) == (33, 0, 0)


@backends
def test_another_model_is_routed_as_recorded(backend, tmp_path):
    """Ids are those of the run, in its order; weights follow from the live probabilities at these ids."""
    model = prepared(backend)
    other = perturbed(model)
    ids, mask = padded_batch("left")
    call = {"input_ids": ids, "attention_mask": mask}
    with Routers(model) as before:
        recorded(model, tmp_path / "run", call)
    with torch.no_grad(), Routers(other) as alone:
        other(**call)
    # Hooks run in the order in which they were put: these see what the replay made of the output.
    with torch.no_grad(), omnigene_fast.replay(other, tmp_path / "run"), Routers(other) as made:
        other(**call)
    keep = mask.bool().flatten()
    (_, _, index), (_, _, wanted), (_, _, free) = (next(each.forwards()) for each in (made, before, alone))
    probabilities, weights, _ = next(made.forwards())
    assert torch.equal(index[:, keep], wanted[:, keep])
    assert torch.equal(index[0][~keep], free[0][~keep]), "padding is routed live"
    assert (free[:, keep] != wanted[:, keep]).any(), "the other model is no control"
    for layer, block in enumerate(moe_layers(other)):
        chosen = probabilities[layer].double().gather(-1, index[layer])
        expected = chosen / chosen.sum(-1, keepdim=True) * block.router.per_expert_scale.double()[index[layer]]
        assert relative_error(weights[layer][keep], expected[keep]) < 1e-6


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(7, EXPERTS, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(EXPERTS, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(7)])

    def weights(logits, scale):
        live = reference.topk_gate(logits, scale, top_k=TOP_K)
        return reroute(live, ids, scale)[1]

    assert torch.autograd.gradcheck(weights, (logits, scale))


@backends
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_replays_in_both_forwards_of_checkpointing(backend, checkpointing, tmp_path):
    model = prepared(backend)
    other = perturbed(model).train()
    ids = tokens(2, 7)
    recorded(model, tmp_path / "run", {"input_ids": ids})
    plain = copy.deepcopy(other)
    if checkpointing is not None:
        other.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        other.enable_input_require_grads()
    gradients = []
    for each in (plain, other):
        with omnigene_fast.replay(each, tmp_path / "run") as again:
            each(ids, labels=ids).loss.backward()
        assert again.remaining == 0
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("router.proj" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-6, name
    free = copy.deepcopy(plain)
    free.zero_grad()
    free(ids, labels=ids).loss.backward()
    assert max(relative_error(p.grad, gradients[0][n]) for n, p in free.named_parameters() if n in gradients[0]) > 1e-3


def test_two_forwards_before_a_checkpointed_backward_are_refused(tmp_path):
    model = prepared("reference").train()
    ids = tokens(2, 7)
    recorded(model.eval(), tmp_path / "run", {"input_ids": ids}, {"input_ids": ids})
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with omnigene_fast.replay(model, tmp_path / "run"):
        loss = model(ids, labels=ids).loss + model(ids, labels=ids).loss
        with pytest.raises(RuntimeError, match="expected one forward per backward with gradient checkpointing, got 2"):
            loss.backward()


def test_generate_is_replayed_step_by_step(tmp_path):
    model = prepared("cpu")
    ids, mask = padded_batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with omnigene_fast.trace(model, tmp_path / "run"):
        out = model.generate(ids, **options)
    with omnigene_fast.replay(model, tmp_path / "run") as again:
        assert torch.equal(model.generate(ids, **options), out)
    assert again.remaining == 0


def test_each_record_is_consumed_once(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 6)
    recorded(model, tmp_path / "run", {"input_ids": ids})
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run") as again:
        again.label(doc_ids=[0, 1])
        model(ids)
        with pytest.raises(LookupError, match="holds no record of its token 6 that was not consumed before"):
            model(ids)
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run", missing="recompute") as again:
        live = model(torch.cat([ids, ids[:1]])).logits
        assert (again.consumed, again.recomputed) == (12, 6)
    with torch.no_grad():
        assert torch.equal(model(torch.cat([ids, ids[:1]])).logits, live)


def test_documents_by_number_and_other_tokens(tmp_path):
    model = prepared("reference")
    ids = tokens(3, 6)
    logits = recorded(model, tmp_path / "run", {"input_ids": ids})[0]
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run") as again:
        again.label(doc_ids=[2, 0])
        assert relative_error(model(ids[[2, 0]]).logits, logits[[2, 0]]) < 1e-6
        assert again.remaining == 6
        again.label(doc_ids=[1])
        with pytest.raises(LookupError, match="document 1 was recorded with token id"):
            model(ids[:1])


def test_what_cannot_be_replayed_is_refused(tmp_path):
    model = prepared("reference")
    recorded(model, tmp_path / "run", {"input_ids": tokens(1, 4)})
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "counts", record=()):
        model(tokens(1, 4))
    with pytest.raises(ValueError, match="expected one that was recorded with 'ids', got nothing"):
        omnigene_fast.replay(model, tmp_path / "counts")
    with pytest.raises(ValueError, match="6 experts and top-3 as in the model, got layers"):
        omnigene_fast.replay(gemma4(num_experts=6), tmp_path / "run")
    with pytest.raises(ValueError, match="missing: expected 'raise' or 'recompute', got 'skip'"):
        omnigene_fast.replay(model, tmp_path / "run", missing="skip")
    with pytest.raises(FileNotFoundError):
        omnigene_fast.replay(model, tmp_path / "none")


@backends
def test_the_model_is_left_as_it_was(backend, tmp_path):
    model = prepared(backend)
    ids = tokens(1, 4)
    recorded(model, tmp_path / "run", {"input_ids": ids})
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run"):
        model(ids)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
