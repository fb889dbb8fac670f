"""What a trace holds against what the routers returned: padded, packed, generated, checkpointed, compiled."""

import copy
import functools

import numpy as np
import peft
import pytest
import torch
import transformers

import omnigene_fast
import omnigene_fast.tracing.calls
from omnigene_fast.integrations import gemma4 as gemma4_integration
from omnigene_fast.tracing import buffers, capture
from omnigene_fast.tracing.records import PHASES, STATISTICS
from omnigene_fast.tracing.scribe import Scribe

from .. import helpers
from ..helpers import EXPERTS, TOP_K, backend_params, gemma4, moe_layers, tokens

backends = pytest.mark.parametrize("backend", ["stock", *backend_params()])


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()


def prepared(backend, **changes):
    model = gemma4(**changes)
    return model if backend == "stock" else omnigene_fast.accelerate(model, backend=backend)


class Routers:
    """Keeps what every router returned, call after call."""

    def __init__(self, model):
        self.made = []
        self.hooks = [
            layer.router.register_forward_hook(lambda _m, _i, out: self.made.append([x.detach().clone() for x in out]))
            for layer in moe_layers(model)
        ]
        self.layers = len(self.hooks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def forwards(self):
        """Per forward: index [L, T, K], weights [L, T, K], probabilities [L, T, E]."""
        for start in range(0, len(self.made), self.layers):
            yield [torch.stack(parts) for parts in zip(*self.made[start : start + self.layers], strict=True)]


def assert_recorded(path, forwards, keeps):
    """The run holds the kept rows of every forward, in order, bit for bit."""
    run = omnigene_fast.open_trace(path)
    assert run.verify() == []
    batches = list(run.batches(kinds=run.record))
    found = {}
    for records in batches:
        for row, (doc, pos) in enumerate(zip(records.doc.tolist(), records.pos.tolist(), strict=True)):
            found[doc, pos] = records.ids[:, row], records.weights[:, row], records.stats[:, row]
    expected = {}
    for (probabilities, weights, index), keep in zip(forwards, keeps, strict=True):
        for row, identity in keep.items():
            assert identity not in expected
            expected[identity] = index[:, row], weights[:, row].half(), probabilities[:, row]
    assert found.keys() == expected.keys()
    for identity, (ids, weights, stats) in found.items():
        index, half, probabilities = expected[identity]
        assert np.array_equal(ids, index.cpu().numpy()), identity
        assert np.array_equal(weights, half.cpu().numpy()), identity
        entropy = torch.special.entr(probabilities.double()).sum(-1)
        assert np.abs(stats[:, STATISTICS.index("entropy")] - entropy.cpu().numpy()).max() < 3e-3
    counts = np.zeros_like(run.counts)
    for (doc, _), (index, _, _) in expected.items():
        at = run.documents["doc_id"].tolist().index(doc)
        for layer, ids in enumerate(index.tolist()):
            counts[at, layer, ids] += 1
    assert np.array_equal(run.counts, counts)
    return run


def rows_of(mask):
    """Row in the batch -> (document, position) of the tokens that `mask` [B, S] keeps, a document per row."""
    B, S = mask.shape
    return {b * S + s: (b, int(mask[b, : s + 1].sum()) - 1) for b in range(B) for s in range(S) if mask[b, s]}


def padded_batch(side="right"):
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, length in ((1, 12), (2, 1)):
        if side == "right":
            mask[row, length:] = 0
        else:
            mask[row, :-length] = 0
    return ids, mask


@backends
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(side, backend, tmp_path):
    model = prepared(backend)
    ids, mask = padded_batch(side)
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(ids, attention_mask=mask)
        assert tr.counts.sum() == 33 * 3 * TOP_K
    run = assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask)])
    for row, (document, records) in enumerate(run.iter_documents()):
        assert document["doc_id"] == row
        assert records.token.tolist() == ids[row][mask[row].bool()].tolist()
        assert {PHASES[phase] for phase in records.phase} == {"prefill"}


@backends
def test_bug_26_masked_tokens_are_never_counted(backend):
    """26: SGLang #25852/#30895, Megatron #2121 count padding and the rows that fill up a graph."""
    model = prepared(backend)
    ids, mask = padded_batch()
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        model(ids, attention_mask=mask)
    alone = []
    for row in range(3):
        with torch.no_grad(), omnigene_fast.trace(model) as one:
            model(ids[row : row + 1, : int(mask[row].sum())])
        alone.append(one.counts[0])
    assert np.array_equal(tr.counts, np.stack(alone))
    with torch.no_grad(), omnigene_fast.trace(model) as unmasked:
        model(ids)
    assert not np.array_equal(tr.counts, unmasked.counts), "the padding is no control"


@backends
def test_packed_by_position_ids_and_by_number(backend, tmp_path):
    model = prepared(backend)
    ids = tokens(2, 12)
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]])
    documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 9 + [3] * 3])
    keep = {b * 12 + s: (int(documents[b, s]), int(position[b, s])) for b in range(2) for s in range(12)}
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        model(ids, position_ids=position)
    assert_recorded(tmp_path / "run", made.forwards(), [keep])
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "numbered") as tr:
        tr.label(doc_ids=torch.where(documents == 2, -1, documents + 40), task="dna")
        model(ids, position_ids=position)
    kept = {row: (doc + 40, pos) for row, (doc, pos) in keep.items() if doc != 2}
    run = assert_recorded(tmp_path / "numbered", made.forwards(), [kept])
    assert run.documents["task"].tolist() == ["dna"] * 3


@backends
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_records_prefill_and_every_step_once(cache, backend, tmp_path):
    model = prepared(backend)
    ids, mask = padded_batch("left")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    model.generation_config.eos_token_id = None
    with Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run") as tr:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    assert tr.calls == 6
    keeps = [rows_of(mask)]
    for step in range(5):
        keeps.append({row: (row, int(mask[row].sum()) + step) for row in range(3)})
    run = assert_recorded(tmp_path / "run", made.forwards(), keeps)
    for row, (_, records) in enumerate(run.iter_documents()):
        assert [PHASES[phase] for phase in records.phase].count("decode") == 5
        # 28: prime-rl #1672, ms-swift #9799: the last token off by one, lengths that differ
        assert records.token.tolist() == [*ids[row][mask[row].bool()].tolist(), *out[row, 20:25].tolist()]


test_bug_28_last_token_off_by_one = test_generate_records_prefill_and_every_step_once


def test_a_finished_row_is_recorded_no_further():
    """Rows of a batch that have ended are fed on by `generate`: they count as they would alone."""
    model = prepared("reference")
    ids = tokens(2, 8)
    model.generation_config.eos_token_id = None
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = end = int(free[0, 10])
    model.generation_config.pad_token_id = 0
    stop = [[*row[8:].tolist(), end].index(end) for row in free]
    with omnigene_fast.trace(model) as tr:
        model.generate(ids, max_new_tokens=8, do_sample=False)
    expected = [8 + min(at, 7) for at in stop]
    assert tr.counts.sum((1, 2)).tolist() == [n * 3 * TOP_K for n in expected]
    assert min(expected) < 15, "no row ended early"


def test_a_second_turn_wakes_rows_that_had_ended(tmp_path):
    model = prepared("reference")
    ids, turn = tokens(2, 8), tokens(2, 5, seed=1)
    model.generation_config.eos_token_id = None
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = int(free[0, 10])
    model.generation_config.pad_token_id = 0
    with omnigene_fast.trace(model) as tr:
        first = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        before = tr.counts.sum((1, 2)) // (3 * TOP_K)
        with torch.no_grad():
            model(turn, past_key_values=first.past_key_values)
        after = tr.counts.sum((1, 2)) // (3 * TOP_K)
    assert before.min() < 15
    assert (after - before).tolist() == [5, 5]


def test_a_mask_as_long_as_a_static_cache(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 6)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :3] = 0
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model(ids, attention_mask=mask, past_key_values=cache)
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.documents["n_tokens"].tolist() == [6, 3]
    assert [records.token.tolist() for _, records in run.iter_documents()] == [ids[0].tolist(), ids[1, 3:].tolist()]


def test_a_packed_row_may_begin_within_a_document(tmp_path):
    model = prepared("reference")
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model(tokens(1, 12), position_ids=torch.tensor([[5, 6, 7, 8, 0, 1, 2, 3, 0, 1, 2, 3]]))
    assert omnigene_fast.open_trace(tmp_path / "run").documents["n_tokens"].tolist() == [4, 4, 4]


def test_numbers_that_are_held_already_go_on(tmp_path):
    """The same number continues its document: numbered automatically before, or in an earlier session."""
    model = prepared("reference")
    ids = tokens(2, 6)
    for session in range(2):
        with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run") as tr:
            if session == 0:
                model(ids)
            tr.label(doc_ids=[1, 7])
            model(ids)
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.verify() == []
    assert dict(zip(run.documents["doc_id"], run.documents["n_tokens"], strict=True)) == {0: 6, 1: 18, 7: 12}


def test_an_interrupted_forward_stops_nothing():
    model = prepared("reference")
    ids = tokens(1, 4)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        hook = moe_layers(model)[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        hook.remove()
        model(ids)
        model(ids)
    assert tr.calls == 2
    assert tr.counts.sum() == 2 * 4 * 3 * TOP_K


def test_a_copy_of_the_model_is_not_traced():
    model = prepared("cpu")
    ids = tokens(1, 4)
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        twin = copy.deepcopy(model)
        twin(ids)
        model(ids)
        assert tr.calls == 1
        assert twin.get_compiled_call.args[0] is twin, "the copy would decode with the original"
        with omnigene_fast.trace(twin) as other:
            twin(ids)
        assert (tr.calls, other.calls) == (1, 1)
        assert np.array_equal(tr.counts, other.counts)


def test_labels_are_those_of_the_call():
    model = prepared("reference")
    names = ["a", "b"]
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        tr.label(task=names, part="x")
        model(tokens(2, 4))
        names[:] = ["c", "d"]
        tr.label(part=None)
        model(tokens(2, 4))
        tr.settle()
        labels = tr._store.snapshot()[2]
    assert labels == [{"task": "a", "part": "x"}, {"task": "b", "part": "x"}, {"task": "a"}, {"task": "b"}]


def test_a_mask_that_cannot_be_read_may_be_given():
    model = prepared("reference")
    ids, odd = tokens(1, 4), torch.ones(1, 4, 4).tril()[:, None, :, :3]
    with torch.no_grad(), pytest.raises(ValueError, match="pass mask= to say which tokens count"):
        omnigene_fast.tracing.calls.valid_tokens(call_of(ids, odd))
    with torch.no_grad(), omnigene_fast.trace(model, mask=torch.tensor([[1, 1, 1, 0]])) as tr:
        model(ids)
    assert tr.tokens == 3


def call_of(ids, mask):
    from omnigene_fast.tracing.calls import describe

    return describe(prepared("reference"), {"input_ids": ids, "attention_mask": mask})


def test_a_full_disk_at_the_end_can_be_closed_again(tmp_path, monkeypatch):
    from omnigene_fast.tracing import manifest

    model, write = prepared("reference"), manifest.write_segment
    tr = omnigene_fast.trace(model, tmp_path / "run")
    with torch.no_grad():
        tr.__enter__()
        model(tokens(2, 4))
    monkeypatch.setattr(manifest, "write_segment", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        tr.close()
    monkeypatch.setattr(manifest, "write_segment", write)
    tr.close()
    assert omnigene_fast.open_trace(tmp_path / "run").documents["n_tokens"].tolist() == [4, 4]


def test_the_model_of_a_run_may_move_and_switch(tmp_path):
    """What a model is called and whether it caches is no part of what it is: its run is continued."""
    model = prepared("reference")
    for change in ({}, {"use_cache": False}, {"_name_or_path": "elsewhere"}):
        for name, value in change.items():
            setattr(model.config, name, value)
        meta = {"model": "the same"}
        with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run", meta=meta):
            model(tokens(1, 4))
    assert len(omnigene_fast.open_trace(tmp_path / "run").documents) == 3


def test_a_chat_goes_on_with_its_cache(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 10)
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        first = model(ids[:, :6], use_cache=True)
        model(ids[:, 6:], past_key_values=first.past_key_values)
        model(ids[:, :3])
    keeps = [
        rows_of(torch.ones(2, 6)),
        {b * 4 + s: (b, 6 + s) for b in range(2) for s in range(4)},
        {b * 3 + s: (2 + b, s) for b in range(2) for s in range(3)},
    ]
    assert_recorded(tmp_path / "run", made.forwards(), keeps)


@backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_bug_25_checkpointing_counts_once(reentrant, backend, tmp_path):
    """25: plain hooks count the second forward of gradient checkpointing as well."""
    model = prepared(backend).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids, mask = padded_batch()
    with Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        for _ in range(2):
            model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert len(made.made) == 4 * 3, "the second forward did not run"
    forwards = list(made.forwards())
    again = {row: (doc + 3, pos) for row, (doc, pos) in rows_of(mask).items()}
    # Checkpointing runs the layers again in falling order; the first forward of each step is what counts.
    run = assert_recorded(tmp_path / "run", [forwards[0], forwards[2]], [rows_of(mask), again])
    assert {PHASES[phase] for records in run.batches() for phase in records.phase} == {"train"}


@backends
@pytest.mark.parametrize("how", ["wrapper", "in place", "layers"])
def test_compiled(how, backend, tmp_path):
    model = prepared(backend)
    ids, mask = padded_batch()
    expected = copy.deepcopy(model)
    options = {"backend": "aot_eager", "fullgraph": True}
    run_model = model
    if how == "wrapper":
        run_model = torch.compile(model, **options)
    elif how == "in place":
        model.compile(**options)
    else:
        for layer in moe_layers(model):
            layer.compile(**options)
    with torch.no_grad(), Routers(expected) as made:
        expected(ids, attention_mask=mask)
        expected(ids[:, :9], attention_mask=mask[:, :9])
    with torch.no_grad(), omnigene_fast.trace(run_model, tmp_path / "run"):
        run_model(ids, attention_mask=mask)
        run_model(ids[:, :9], attention_mask=mask[:, :9])
    second = {row: (doc + 3, pos) for row, (doc, pos) in rows_of(mask[:, :9]).items()}
    assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask), second])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_training_counts_once(backend, checkpointing):
    model = prepared(backend).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 8)
    compiled = torch.compile(model, backend="aot_eager")
    with omnigene_fast.trace(compiled) as tr:
        for _ in range(2):
            compiled(ids, labels=ids).loss.backward()
    assert tr.counts.sum() == 2 * 16 * 3 * TOP_K


def test_generate_with_a_compiled_call(tmp_path, monkeypatch):
    """With a static cache on a GPU `generate` decodes by torch.compile(model.__call__); forced here on the CPU."""
    model = prepared("cpu")
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ids = tokens(2, 6)
    model.generation_config.eos_token_id = None
    with omnigene_fast.trace(model, tmp_path / "run") as tr:
        config = transformers.CompileConfig(backend="aot_eager", fullgraph=False, mode=None)
        out = model.generate(
            ids, max_new_tokens=5, do_sample=False, cache_implementation="static", compile_config=config
        )
    assert tr.calls == 5
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.verify() == []
    assert [records.token.tolist() for _, records in run.iter_documents()] == out[:, :10].tolist()
    assert "get_compiled_call" not in model.__dict__


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("how", ["wrapper", "module", "layers"])
def test_another_trace_compiles_nothing(how, backend, tmp_path):
    """A graph must not depend on which trace is open, only on whether one is."""
    model, ids = prepared(backend), tokens(2, 6)
    run_model, options = model, {"backend": "aot_eager", "fullgraph": how != "layers"}
    if how == "wrapper":
        run_model = torch.compile(model, **options)
    elif how == "module":
        model.compile(**options)
    else:
        for layer in model.model.layers:
            layer.compile(**options)
    graphs = torch._dynamo.utils.counters["stats"]
    found = []
    for number in range(10):
        with torch.no_grad(), omnigene_fast.trace(run_model, tmp_path / str(number)) as tr:
            run_model(ids, use_cache=False)
            found.append(tr.counts)
        with torch.no_grad():
            run_model(ids, use_cache=False)
        if number == 0:  # one graph with a trace, one without
            compiled = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == compiled
    assert found[0].sum() == 2 * 6 * 3 * TOP_K
    assert all(np.array_equal(counts, found[0]) for counts in found)


def test_two_watches_of_one_model(tmp_path):
    """A trace and a replay share two hooks, and each takes back what is its own."""
    model, ids = prepared("reference"), tokens(1, 5)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model(ids)
    replay, tr = omnigene_fast.replay(model, tmp_path / "run"), omnigene_fast.trace(model)
    with torch.no_grad(), tr:
        with replay:
            assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
            model(ids)
        model(ids)
        twin = copy.deepcopy(model)
        with omnigene_fast.trace(twin) as other:
            twin(ids)
    assert (replay.consumed, tr.calls, other.calls) == (5, 2, 1)
    for each in (model, model.model):
        assert not each.__dict__.keys() & {"generate", "get_compiled_call", "_omnigene_fast_watches"}
        assert not any((each._forward_hooks, each._forward_pre_hooks, each._forward_hooks_always_called))


def test_a_model_compiled_before_is_traced_after():
    model = prepared("reference")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(2, 8)
    with torch.no_grad():
        plain = compiled(ids).logits
        with omnigene_fast.trace(compiled) as tr:
            traced = compiled(ids).logits
        after = compiled(ids).logits
    assert tr.counts.sum() == 16 * 3 * TOP_K
    assert torch.equal(plain, traced)
    assert torch.equal(plain, after)


@backends
def test_bug_27_layers_are_not_swapped(backend, tmp_path, monkeypatch):
    """27: NeMo-RL #3903: the layer index was off. A dense layer is not counted away, and a swap of two is noticed."""
    model = prepared(backend)
    dense = moe_layers(model)[0]
    dense.enable_moe_block = False
    del dense.router
    ids = tokens(2, 9)
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(ids)
    assert tr.layers == [1, 2]
    run = assert_recorded(tmp_path / "run", made.forwards(), [rows_of(torch.ones(2, 9))])
    assert run.layers == [1, 2]

    class Swapped(buffers.Buffers):
        def reserve(self, count):
            changed = super().reserve(count)
            self._views = self._views[::-1] if changed else self._views
            return changed

    monkeypatch.setattr(capture, "Buffers", Swapped)
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "swapped"):
        model(ids)
    with pytest.raises(AssertionError):
        assert_recorded(tmp_path / "swapped", made.forwards(), [rows_of(torch.ones(2, 9))])


@pytest.mark.parametrize("experts", [254, 255, 256, 257, 512])
def test_bug_29_more_than_256_experts(experts, tmp_path):
    """29: prime-rl #3051 kept ids of more than 256 experts in uint8."""
    for backend in ("stock", "cpu"):
        model = prepared(backend, num_experts=experts, top_k_experts=8, num_hidden_layers=2, layer_types=None)
        ids = tokens(2, 30)
        with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / backend):
            model(ids)
        forwards = list(made.forwards())
        assert forwards[0][2].max() > 250, "no id is large"
        assert_recorded(tmp_path / backend, forwards, [rows_of(torch.ones(2, 30))])


def test_bug_22_entropy_of_logits_and_of_probabilities():
    """22: moewatch took the softmax of a softmax: the first output of a router may be either, told by its rows."""
    logits = torch.randn(50, EXPERTS) * 3
    probabilities = logits.softmax(-1)
    from omnigene_fast import reference

    assert torch.equal(reference.as_probabilities(probabilities), probabilities)
    assert (reference.as_probabilities(logits) - probabilities).abs().max() < 1e-6
    assert torch.equal(reference.as_probabilities(probabilities.bfloat16()), probabilities.bfloat16().float())


def test_bug_23_no_layer_matched():
    """23: plumb-moe found 0 layers on Gemma-4 and said nothing."""
    with pytest.raises(ValueError, match="expected a Gemma-4 with mixture-of-experts layers, got a Linear"):
        omnigene_fast.trace(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got a MixtralForCausalLM without a router"):
        omnigene_fast.trace(helpers.mixtral())


def test_bug_24_nothing_recorded_raises(tmp_path):
    """24: vLLM #33013, FlashInfer #3382: unused slots held zeros, and 0 is an expert."""
    model = prepared("reference")
    with pytest.raises(RuntimeError, match="nothing was recorded in 0 calls"), omnigene_fast.trace(model):
        pass
    ids = tokens(1, 4)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="nothing was recorded in 1 calls"),
        omnigene_fast.trace(model, tmp_path / "run") as tr,
    ):
        model(ids, attention_mask=torch.zeros(1, 4, dtype=torch.long))
    assert tr.counts.shape == (0, 3, EXPERTS)
    with pytest.raises(ZeroDivisionError), omnigene_fast.trace(model):  # the caller's own error is not covered up
        raise ZeroDivisionError


def test_bug_24_a_router_that_did_not_run_is_an_error(monkeypatch):
    """24: what no gate wrote is no expert 0: a stale or unwritten row is told from a record."""
    model = prepared("reference")
    ids = tokens(1, 4)
    attach = buffers.Buffers.attach

    def without_one(self):
        attach(self)
        gemma4_integration.set_trace(self._routers[1], None)

    tr = omnigene_fast.trace(model)
    with torch.no_grad(), tr:
        model(ids)
        tr.flush()
        monkeypatch.setattr(buffers.Buffers, "attach", without_one)
        model(ids)
        with pytest.raises(RuntimeError, match="router of layer 1 did not write"):
            tr.close()


def test_bug_30_memory_is_flat_over_10_000_steps(tmp_path):
    """30: SGLang #18587, vLLM #28284: lists without bound. Steps as those of a replayed CUDA graph."""
    import resource

    model = prepared("cpu", num_hidden_layers=1, layer_types=["full_attention"])
    router = moe_layers(model)[0].router
    hidden, ids = torch.randn(2, helpers.HIDDEN), tokens(2, 1)
    with (
        torch.no_grad(),
        omnigene_fast.trace(model, tmp_path / "run", record=("ids",), segment_tokens=1024, max_tokens=2) as tr,
    ):
        for step in range(10_000):
            tr._buffers.attach()  # a captured graph keeps their addresses
            router(hidden)
            tr.step(input_ids=ids)
            if step == 2_000:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tr.flush()
        tr._buffers.detach()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000, f"grew by {grown} kB"
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.counts.sum() == 10_000 * 2 * TOP_K


@pytest.mark.parametrize("policy", ["block", "drop", "raise"])
def test_a_full_budget(policy, tmp_path, monkeypatch):
    import threading

    model = prepared("reference")
    ids, gate = tokens(2, 8), threading.Event()
    write = Scribe.write
    monkeypatch.setattr(Scribe, "write", lambda self, item: (gate.wait(5), write(self, item))[1])
    tr = omnigene_fast.trace(model, tmp_path / "run", budget=1000, on_full=policy)
    with torch.no_grad(), tr:
        model(ids)
        if policy == "block":
            threading.Timer(0.3, gate.set).start()
            for _ in range(3):
                model(ids)
        elif policy == "drop":
            for _ in range(3):
                model(ids)
            gate.set()
            tr.flush()
            model(ids)
        else:
            with pytest.raises(RuntimeError, match="1,000 bytes wait for the writer"):
                model(ids)
            gate.set()
            tr.flush()
    recorded = {"block": 4, "drop": 2, "raise": 1}[policy]
    assert tr.tokens == recorded * 16
    assert tr.dropped == {"block": 0, "drop": 48, "raise": 16}[policy]
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.dropped == tr.dropped
    assert run.documents["n_tokens"].tolist() == [8] * 2 * recorded
    # What was dropped keeps its documents' numbers, so that what follows is not taken for it.
    assert run.documents["doc_id"].tolist() == ([0, 1, 8, 9] if policy == "drop" else list(range(2 * recorded)))


def test_peft_and_a_wrapped_router(tmp_path):
    model = prepared("reference")
    config = peft.LoraConfig(r=4, target_modules=["router.proj", "q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    ids, mask = padded_batch("left")
    with torch.no_grad(), Routers(wrapped) as made, omnigene_fast.trace(wrapped, tmp_path / "run"):
        wrapped(ids, attention_mask=mask)
    assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask)])
    with omnigene_fast.trace(wrapped) as tr:
        wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert tr.calls == 3


def test_conditional_generation_and_autocast(tmp_path):
    model = omnigene_fast.accelerate(helpers.gemma4_conditional())
    ids, mask = padded_batch()
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        model(input_ids=ids, attention_mask=mask)
    assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask)])
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        Routers(model) as made,
        omnigene_fast.trace(model, tmp_path / "autocast"),
    ):
        model(input_ids=ids, attention_mask=mask)
    assert_recorded(tmp_path / "autocast", made.forwards(), [rows_of(mask)])


@backends
def test_images(tmp_path, backend):
    """The tokens of an image are recorded under the image token's id, and a document for each kind counts apart."""
    model = helpers.gemma4_conditional()
    model.config.image_token_id = 290
    if backend != "stock":
        omnigene_fast.accelerate(model, backend=backend)
    ids, mask = padded_batch()
    image = torch.zeros_like(mask)
    image[:, 2:6] = mask[:, 2:6]
    ids = torch.where(image.bool(), 290, torch.where(ids == 290, 291, ids))
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).flatten(0, 1)
    count = int(image.sum()) // 4  # images of 4 x 4 patches, 2 x 2 of them pooled
    assert count * 4 == image.sum()
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": image,
        "pixel_values": torch.rand(count, 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(0)),
        "image_position_ids": grid.expand(count, 16, 2),
    }
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run") as tr:
        tr.label(doc_ids=image)
        model(**inputs)
    run = omnigene_fast.open_trace(tmp_path / "run")
    ((_, _, index),) = made.forwards()
    for document, of in enumerate((mask.bool() & ~image.bool(), image.bool())):
        expected = torch.nn.functional.one_hot(index[:, of.flatten()], EXPERTS).sum((1, 2))
        assert np.array_equal(run.counts[document], expected.numpy())
    for _, records in run.iter_documents():
        of = image.bool() if records.doc[0] else mask.bool() & ~image.bool()
        assert records.token.tolist() == ids[of].tolist()


def test_inner_models_and_embeddings(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 6)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model.model(ids)
        model(inputs_embeds=model.get_input_embeddings()(ids))
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert np.array_equal(run.counts[:2], run.counts[2:])
    assert [records.token.tolist() for _, records in run.iter_documents()] == [*ids.tolist(), [-1] * 6, [-1] * 6]


def test_a_mask_instead_of_the_models(tmp_path):
    """Only what is learned, say: positions are still those in the document."""
    model = prepared("reference")
    ids, mask = padded_batch()
    learned = torch.zeros_like(mask)
    learned[:, 3:7] = 1
    keep = {row: identity for row, identity in rows_of(mask).items() if learned.flatten()[row]}
    for given in (learned, lambda inputs: (inputs["labels"] != -100) & mask.bool()):
        path = tmp_path / type(given).__name__
        with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, path, mask=given):
            model(ids, attention_mask=mask, labels=torch.where(learned.bool(), ids, -100))
        extra = {40 + s: (2, s) for s in range(3, 7)} if isinstance(given, torch.Tensor) else {}
        if extra:  # the tensor overrides the attention mask: padding that it names counts
            found = {(r.doc[i], r.pos[i]) for r in omnigene_fast.open_trace(path).batches() for i in range(len(r))}
            assert len(found) == 12
        else:
            assert_recorded(path, made.forwards(), [keep])
    with torch.no_grad(), pytest.raises(ValueError, match=r"mask: expected \[B, S\] = \[3, 20\]"):  # noqa: SIM117
        with omnigene_fast.trace(model, mask=learned[:, :5]):
            model(ids)


def test_labels_reach_the_documents(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 6)
    odd = 'it\'s "<b>;DROP TABLE documents" ../.. é 蛋白'
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run", labels={"task": "dna"}) as tr:
        model(ids)
        tr.label(task=["rna", odd], split="test")
        model(ids)
        tr.label(doc_ids=[17, 3])
        model(ids)
        model(ids)
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.verify() == []
    table = run.documents
    assert table["doc_id"].tolist() == [0, 1, 2, 3, 17]
    assert table["task"].tolist() == ["dna", "dna", "rna", odd, "rna"]
    assert table["n_tokens"].tolist() == [6, 6, 6, 18, 12]
    assert table["text_hash"].iloc[0] == table["text_hash"].iloc[2] != table["text_hash"].iloc[1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a b": "x"}, "name of letters, digits and _"),
        ({"counts": "x"}, "no column of the store"),
        ({"task": "line\nbreak"}, "control characters"),
        ({"task": ["a", 3]}, "to be text, got int"),
    ],
)
def test_odd_labels_are_refused_in_a_sentence(labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        omnigene_fast.trace(prepared("reference"), labels=labels)


def test_label_lists_and_numbers_must_fit_the_call():
    model = prepared("reference")
    ids = tokens(2, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="expected one 'task' per row of the call, 2, got 3"):  # noqa: SIM117
        with omnigene_fast.trace(model, labels={"task": ["a", "b", "c"]}):
            model(ids)
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        model(ids)
        tr.label(doc_ids=[1, 2, 3])
        model(ids)
        with pytest.raises(ValueError, match=r"doc_ids: expected one per row \[2\]"):
            tr.close()
    with pytest.raises(ValueError, match="doc_ids: expected integers"):
        omnigene_fast.trace(model).label(doc_ids=[0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": ("ids", "logits")}, "record: expected some of ids, weights, stats, got 'ids', 'logits'"),
        ({"on_full": "wait"}, "on_full: expected one of block, drop, raise, got 'wait'"),
        ({"budget": "2 elephants"}, "budget: expected bytes as a positive number or a text such as '2GiB'"),
        ({"mask": [1]}, r"mask: expected a tensor \[B, S\], a function or None, got list"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        omnigene_fast.trace(prepared("reference"), **options)


@backends
def test_the_model_is_left_as_it_was(backend):
    model = prepared(backend)

    def state():
        return [
            (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    before = state()
    with torch.no_grad(), omnigene_fast.trace(model):
        model(tokens(1, 4))
        with pytest.raises(RuntimeError, match="expected a model without an open trace"), omnigene_fast.trace(model):
            pass
    assert state() == before


def test_a_forward_that_fails_records_nothing_and_stops_nothing():
    model = prepared("reference")
    layer = moe_layers(model)[1]
    ids = tokens(1, 4)
    with torch.no_grad(), omnigene_fast.trace(model) as tr:
        hook = layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        hook.remove()
        model(ids)
    assert tr.calls == 1
    assert tr.counts.sum() == 4 * 3 * TOP_K


def test_an_error_of_the_writer_is_raised(tmp_path, monkeypatch):
    from omnigene_fast.tracing.store import Writer

    model = prepared("reference")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(tokens(1, 4))
        tr.flush()
        monkeypatch.setattr(Writer, "add", full)
        model(tokens(1, 4))
        with pytest.raises(OSError, match="No space left"):
            tr.flush()
        with pytest.raises(OSError, match="No space left"):
            model(tokens(1, 4))
        with pytest.raises(OSError, match="No space left"):
            tr.close()
    assert omnigene_fast.open_trace(tmp_path / "run").documents["n_tokens"].tolist() == [4]


def test_a_run_is_continued_and_another_models_refused(tmp_path):
    model = prepared("reference")
    ids = tokens(2, 5)
    for _ in range(2):
        with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run", record=("ids",)):
            model(ids)
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.documents["doc_id"].tolist() == [0, 1, 2, 3]
    assert np.array_equal(run.counts[:2], run.counts[2:])
    other = prepared("reference", num_experts=6)
    with (
        pytest.raises(ValueError, match="expected to append to a run with"),
        omnigene_fast.trace(other, tmp_path / "run", record=("ids",)),
    ):
        pass
    with torch.no_grad(), omnigene_fast.trace(model):  # the failed one left the path and the model usable
        model(ids)


def test_only_the_owner_of_the_decision_writes(tmp_path, monkeypatch):
    """Under tensor parallelism every rank routes every token; one of them writes."""
    monkeypatch.setattr(capture, "owns_the_decision", lambda model: False)
    model = prepared("reference")
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run") as tr:
        model(tokens(1, 4))
    assert tr.tokens == 0
    assert not (tmp_path / "run").exists()


@backends
def test_calls_in_inference_mode_are_recorded_as_others(backend, tmp_path):
    model, inputs = prepared(backend), tokens(2, 12)
    for name, mode in (("plain", torch.no_grad), ("inference", torch.inference_mode)):
        with omnigene_fast.trace(model, tmp_path / name):
            with mode():
                model(inputs)
                model.generate(inputs, max_new_tokens=3, do_sample=False)
            model(inputs, labels=inputs).loss.backward()  # a training step may follow in the same trace
    counts = [omnigene_fast.open_trace(tmp_path / name).counts for name in ("plain", "inference")]
    assert np.array_equal(*counts)
    assert counts[0].sum(-1).min() > 0
