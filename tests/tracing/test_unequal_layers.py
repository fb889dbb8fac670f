"""Layers with different numbers of experts, as pruning leaves them."""

import numpy as np
import pytest
import torch

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.tracing.merge import merge
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from ..helpers import EXPERTS, TOP_K, gemma4, moe_layers, tokens
from .synthetic import documents, meta
from .test_capture import Routers, assert_recorded, prepared, rows_of


def prune(model, kept):
    """Keep the first experts of each layer."""
    for layer, count in zip(moe_layers(model), kept, strict=True):
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                setattr(layer.experts, name, torch.nn.Parameter(getattr(layer.experts, name)[:count].clone()))
            layer.experts.num_experts = count
            proj = torch.nn.Linear(layer.router.proj.in_features, count, bias=False)
            proj.weight.copy_(layer.router.proj.weight[:count])
            layer.router.proj = proj
            layer.router.per_expert_scale = torch.nn.Parameter(layer.router.per_expert_scale[:count].clone())
    return model


class Padded(Routers):
    """The routers' output, probabilities of as many experts as the largest layer has."""

    def forwards(self):
        E = max(made[0].shape[1] for made in self.made)
        self.made = [[torch.nn.functional.pad(p, (0, E - p.shape[1])), *rest] for p, *rest in self.made]
        return super().forwards()


@pytest.mark.parametrize("backend", ["stock", "reference", "cpu"])
@pytest.mark.parametrize(("most", "kept"), [(EXPERTS, (5, 8, 8)), (EXPERTS, (8, 8, 5)), (300, (200, 300, 120))])
def test_a_trace_of_them(most, kept, backend, tmp_path):
    model = prune(gemma4(num_experts=most), kept)
    if backend != "stock":
        omnigene_fast.accelerate(model, backend=backend)
    ids = tokens(2, 9)
    with torch.no_grad(), Padded(model) as made, omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(ids)
        assert (tr.num_experts, tr.counts.shape[2]) == (max(kept), max(kept))
    run = assert_recorded(tmp_path / "run", made.forwards(), [rows_of(torch.ones(2, 9))])
    assert run.experts_by_layer == list(kept)
    assert (run.counts.sum(2) == 9 * TOP_K).all()
    for layer, count in enumerate(kept):
        assert not run.counts[:, layer, count:].any()
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run") as replay:
        model(ids)
    assert (replay.consumed, replay.remaining) == (18, 0)


def test_load_knows_how_many_there_are(tmp_path):
    kept = (5, 8, 8)
    model = prune(prepared("cpu"), kept)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run", labels={"task": ["a", "a", "b"]}):
        model(tokens(3, 40))
    run = open_trace(tmp_path / "run")
    table = analysis.load(run, None).set_index("layer")
    assert table["experts"].tolist() == list(kept)
    assert table["entropy_max"].tolist() == pytest.approx(np.log(kept).tolist())
    for layer, count in enumerate(kept):
        counts = run.counts.sum(0)[layer, :count]
        assert table["cv"][layer] == pytest.approx(counts.std() / counts.mean())
        assert table["max_vio"][layer] == pytest.approx(counts.max() / counts.mean() - 1)
        assert table["dead"][layer] == (counts == 0).sum()
    for measure in (lambda: analysis.coactivation(run), lambda: analysis.report(run, tmp_path / "report.html")):
        with pytest.raises(ValueError, match=r"expected the same number of experts in every layer of 'run', got \[5"):
            measure()


def test_a_run_keeps_to_its_layers(tmp_path):
    kept = [16, 10, 16]
    shape = meta(experts_by_layer=kept)
    given = documents({0: 4})
    given.ids[1] %= 10
    given.ids[1] = np.arange(4)
    with Writer(tmp_path / "run", shape, record=("ids",)) as writer:
        writer.add(given)
        given.ids[1, 2, 3] = 12
        with pytest.raises(ValueError, match=r"in \[0, 10\) for each token.*no such expert.* in layer 1, token 2"):
            writer.add(given)
    assert open_trace(tmp_path / "run").verify() == []
    for other in (meta(), meta(experts_by_layer=[16, 16, 10])):
        with pytest.raises(ValueError, match="expected to append to a run with experts_by_layer"):
            Writer(tmp_path / "run", other, record=("ids",))
    Writer(tmp_path / "other", meta(), record=("ids",)).close()
    with pytest.raises(ValueError, match="expected the same experts_by_layer"):
        merge([tmp_path / "run", tmp_path / "other"], tmp_path / "both")
    assert merge([tmp_path / "run"], tmp_path / "alone").experts_by_layer == kept
    for wrong in ([16, 10], [10, 10, 10], [16, 3, 16], "16"):
        with pytest.raises(ValueError, match="expected experts_by_layer to hold"):
            Writer(tmp_path / "wrong", meta(experts_by_layer=wrong), record=("ids",))


def test_layers_that_choose_different_numbers_are_refused():
    model = gemma4()
    router = moe_layers(model)[1].router
    router.config = type(router.config)(**{**router.config.to_dict(), "top_k_experts": 2})
    with pytest.raises(ValueError, match=r"all choose as many experts, got top_k_experts \[2, 3\]"):
        omnigene_fast.trace(model)
