"""Tokens to which a router gave NaN: counted, named by layer, and in no count of an expert."""

import logging

import numpy as np
import pytest
import torch

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.tracing import counting, exchange
from omnigene_fast.tracing.manifest import MANIFEST
from omnigene_fast.tracing.merge import merge
from omnigene_fast.tracing.records import unrouted
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from ..helpers import backend_params, gemma4, moe_layers, tokens
from .synthetic import assert_equal_runs, documents, meta

NAN = "the routers gave NaN in layers"
backends = pytest.mark.parametrize("backend", ["stock", *backend_params()])


def poisoned(backend, layer, **changes):
    """A model of which one router has one weight that is NaN."""
    model = gemma4(**changes)
    with torch.no_grad():
        moe_layers(model)[layer].router.proj.weight[2, 3] = torch.nan
    return model if backend == "stock" else omnigene_fast.accelerate(model, backend=backend)


def traced(model, path, **inputs):
    """Tokens without routing [L], and the counts [D, L, E], of one call."""
    with torch.no_grad(), omnigene_fast.trace(model, path) as tr:
        model(**inputs)
        return tr.unrouted, tr.counts


@backends
@pytest.mark.parametrize("experts", [8, 300])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_router_with_a_nan_weight(layer, experts, backend, tmp_path):
    model = poisoned(backend, layer, num_experts=experts, num_hidden_layers=3, layer_types=None)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    lost = [0] * layer + [15] * (3 - layer)  # and every layer after it is given NaN
    with pytest.warns(UserWarning, match=rf"trace: {NAN} {layer} \(15 tokens\)"):
        found, counts = traced(model, tmp_path / "run", input_ids=ids, attention_mask=mask)
    assert found.tolist() == lost
    expected = [[9 * 3, 6 * 3][row] if at < layer else 0 for row in range(2) for at in range(3)]
    assert counts.sum(2).ravel().tolist() == expected
    with pytest.warns(UserWarning, match=rf"run: {NAN} {layer} \(15 tokens\)"):
        run = open_trace(tmp_path / "run")
    assert run.unrouted.tolist() == lost
    assert (run.documents["n_tokens"].to_numpy()[:, None] - run.counts.sum(2) // 3).sum(0).tolist() == lost
    (fault,) = run.verify()
    assert NAN in fault
    (records,) = run.batches(kinds=run.record)
    assert np.array_equal((records.ids == unrouted(experts)).all((1, 2)), np.array(lost) > 0)
    assert np.array_equal(np.isnan(records.stats).all((1, 2)), np.array(lost) > 0)
    assert np.array_equal(run.recount(), run.counts)
    assert np.array_equal(run.histogram(), run.counts.sum(0))


@backends
def test_what_the_model_computes_stays(backend):
    model, ids = poisoned(backend, 1), tokens(2, 9)
    made = []
    hook = moe_layers(model)[1].router.register_forward_hook(lambda _m, _i, out: made.append(out))
    with torch.no_grad():
        model(ids)
    with pytest.warns(UserWarning, match=NAN):
        traced(model, None, input_ids=ids)
    hook.remove()
    for plain, under_trace in zip(*made, strict=True):
        torch.testing.assert_close(plain, under_trace, rtol=0, atol=0, equal_nan=True)
    assert made[0][1].isnan().all()


@backends
def test_one_document_of_nan(backend, tmp_path):
    """The embedding of one token is NaN: the others are recorded as without it."""
    model = gemma4() if backend == "stock" else omnigene_fast.accelerate(gemma4(), backend=backend)
    ids = tokens(3, 7).clamp(min=10)
    with torch.no_grad(), omnigene_fast.trace(model) as clean:
        model(ids)
        counts = clean.counts
    ids[1, 3] = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    with pytest.warns(UserWarning, match=NAN):
        lost, found = traced(model, tmp_path / "run", input_ids=ids)
    assert np.array_equal(found[[0, 2]], counts[[0, 2]])
    # How many rows a NaN among masked values reaches is attention's affair.
    assert (found[1].sum(-1) == 3 * (7 - lost)).all()
    assert (lost >= 4).all()


def test_a_sound_run_says_nothing(tmp_path, recwarn):
    model = omnigene_fast.accelerate(gemma4())
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(tokens(2, 5))
    assert tr.verify() == []
    run = open_trace(tmp_path / "run")
    assert run.unrouted.tolist() == [0, 0, 0]
    assert not [warning for warning in recwarn if NAN in str(warning.message)]


def stored(path, rows, record=("ids",), **shape):
    """A run of two documents; of the layers and tokens of `rows` no router chose experts."""
    given = documents({0: 5, 7: 4}, **shape)
    for layer, token in rows:
        given.ids[layer, token] = unrouted(shape.get("num_experts", 16))
    with Writer(path, meta(**shape), record=record, segment_tokens=4) as writer:
        writer.add(given, {0: {"task": "a"}, 7: {"task": "b"}})
    return given


@pytest.mark.filterwarnings(f"ignore:.*{NAN}")
@pytest.mark.parametrize("num_experts", [16, 254, 255, 700])
@pytest.mark.parametrize("record", [("ids",), ()])
def test_in_the_store(record, num_experts, tmp_path):
    given = stored(tmp_path / "run", [(1, 0), (1, 6), (2, 8)], record, num_experts=num_experts)
    run = open_trace(tmp_path / "run")
    assert run.unrouted.tolist() == [0, 2, 1]
    assert run.counts.sum(2).tolist() == [[20, 16, 20], [16, 12, 12]]
    (fault,) = run.verify()
    assert f"{NAN} 1 (2 tokens), 2 (1 tokens)" in fault
    both = merge([run, run], tmp_path / "both", names=["a", "b"])
    assert both.unrouted.tolist() == [0, 4, 2]
    assert len(both.verify()) == 1
    if record:
        assert np.array_equal(np.concatenate([part.ids for part in run.batches()], 1), given.ids)
        query = f"SELECT layer, doc_id, pos FROM tokens WHERE ids[1] >= {num_experts} ORDER BY ALL"
        assert run.sql(query).fetchall() == [(1, 0, 0), (1, 7, 1), (2, 7, 3)]


@pytest.mark.filterwarnings(f"ignore:.*{NAN}")
def test_a_manifest_that_tells_another_number(tmp_path):
    stored(tmp_path / "run", [(1, 0)])
    file = tmp_path / "run" / MANIFEST
    text = file.read_text()
    assert '"unrouted": [0, 1, 0]' in text
    file.write_text(text.replace('"unrouted": [0, 1, 0]', '"unrouted": [0, 2, 0]'))
    with pytest.warns(UserWarning, match="damaged"):
        run = open_trace(tmp_path / "run")
    assert any("without routing" in fault for fault in run.verify())
    file.write_text(text.replace('"unrouted": [0, 1, 0]', '"unrouted": [0, 1]'))
    with pytest.raises(ValueError, match="expected unrouted tokens of 3 layers, got"):
        open_trace(tmp_path / "run")


def test_half_a_token_is_refused(tmp_path):
    given = documents({0: 5})
    given.ids[1, 2, 3] = 254
    with Writer(tmp_path / "run", meta()) as writer:
        with pytest.raises(ValueError, match=r"254, which says that the router gave NaN, beside other ids.* layer 1"):
            writer.add(given)
        given.ids[1, 2] = 253
        with pytest.raises(ValueError, match="no such expert"):
            writer.add(given)


def test_counts_alone(tmp_path):
    counts = np.zeros((2, 3, 16), np.int32)
    counts[:, :, :4] = np.array([5, 4])[:, None, None]
    counts[1, 2] -= counts[1, 2] > 0
    with Writer(tmp_path / "run", meta(), record=()) as writer:
        writer.add_counts(np.array([0, 1]), counts, np.array([5, 4]))
        counts[1, 2, 0] -= 1
        with pytest.raises(ValueError, match="got 11 in layer 2 of document 3; only"):
            writer.add_counts(np.array([2, 3]), counts, np.array([5, 4]))
    with pytest.warns(UserWarning, match=NAN):
        run = open_trace(tmp_path / "run")
    assert run.unrouted.tolist() == [0, 0, 1]
    assert [NAN in fault for fault in run.verify()] == [True]


@pytest.mark.parametrize("compiled", [True, False])
def test_counting(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(counting.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError))
    rng = np.random.default_rng(0)
    for experts, dtype in ((16, np.uint8), (254, np.uint8), (400, np.uint16)):
        ids = rng.integers(0, experts, (2, 99, 3)).astype(dtype)
        slot = np.sort(rng.integers(0, 3, 99))
        lost = rng.random((2, 99)) < 0.2
        expected = np.zeros((3, 2, experts), int)
        for layer, token in np.argwhere(~lost):
            np.add.at(expected[slot[token], layer], ids[layer, token], 1)
        ids[lost] = np.iinfo(dtype).max - 1
        assert np.array_equal(counting.count_picks(ids, slot, 3, experts), expected)
        ids[1, 98, 2] = np.iinfo(dtype).max
        with pytest.raises(ValueError, match="expected expert ids in"):
            counting.count_picks(ids, slot, 3, experts)


@pytest.mark.filterwarnings(f"ignore:.*{NAN}")
@pytest.mark.parametrize("backend", ["stock", "cpu"])
def test_replay_does_not_route_as_nan_did(backend, tmp_path):
    model, ids = poisoned(backend, 1), tokens(1, 6)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model(ids)
    replay = omnigene_fast.replay(model, tmp_path / "run")
    with torch.no_grad(), replay, pytest.raises(LookupError, match="token 0"):
        model(ids)
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run", missing="recompute") as replay:
        model(ids)
    assert (replay.consumed, replay.recomputed) == (0, 6)


@pytest.mark.filterwarnings(f"ignore:.*{NAN}")
def test_measures_leave_such_layers_out(tmp_path, caplog):
    stored(tmp_path / "run", [*((1, token) for token in range(9)), (2, 3)])
    run = open_trace(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        table = analysis.load(run, "task")
    assert "layers 1 of run 'run' are left out" in caplog.text
    assert sorted(set(table["layer"])) == [0, 2]
    assert table["effective_experts"].notna().all()
    for measure in (analysis.coactivation, analysis.locality):
        assert set(measure(run)["layer"]) == {0}
    refused = (
        lambda: analysis.coactivation(run, layers=[1]),
        lambda: analysis.given_tokens(run),
        lambda: analysis.pairwise(run, "task"),
    )
    for measure in refused:
        with pytest.raises(ValueError, match=r"chose experts for every token, got NaN in \[1, 2\] of 'run'"):
            measure()


@pytest.mark.filterwarnings(f"ignore:.*{NAN}")
def test_formats_of_engines_refuse_and_datasets_keep(tmp_path):
    stored(tmp_path / "run", [(1, 6)])
    run = open_trace(tmp_path / "run")
    for format in ("vllm", "sglang", "megatron"):
        with pytest.raises(ValueError, match=f"{NAN} 1 .1 tokens.* keeps such tokens"):
            exchange.export_run(run, tmp_path / "other", format)
    with pytest.raises(ValueError, match="keeps such tokens"):
        next(exchange.to_routed_experts(run))
    exchange.export_run(run, tmp_path / "kept", "datasets")
    again = exchange.import_run(tmp_path / "kept", tmp_path / "again", "datasets")
    assert_equal_runs(again, run)
    assert again.unrouted.tolist() == [0, 1, 0]
