"""Which document a token belongs to when sequences go on: with a cache, without one, or with one that was changed."""

import copy

import numpy as np
import peft
import pytest
import torch
from transformers import DynamicCache

import omnigene_fast
from omnigene_fast.tracing.calls import _rows

from ..helpers import gemma4, tokens

WIDE = {"sliding_window": 64}  # a longer sequence cannot be cropped


def prepared(**changes):
    # A head of its own, or the model repeats its last token.
    model = omnigene_fast.accelerate(gemma4(tie_word_embeddings=False, **changes), backend="reference")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def recorded(path):
    """Token ids and positions of every document, in their order; the run is sound."""
    run = omnigene_fast.open_trace(path)
    assert run.verify() == []
    return [(records.token.tolist(), records.pos.tolist()) for _, records in run.iter_documents()]


def empty_cache(model):
    return DynamicCache(config=model.config)


def assert_same_documents(model, path, ids, **options):
    """`generate` without a cache leaves the documents, texts, counts and phases that it leaves with one."""
    texts, runs = [], []
    for use_cache in (True, False):
        where = path / str(use_cache)
        with omnigene_fast.trace(model, where):
            texts.append(model.generate(ids, use_cache=use_cache, do_sample=False, **options).tolist())
        runs.append(omnigene_fast.open_trace(where))
        assert runs[-1].verify() == []
    assert texts[0] == texts[1]
    with_cache, without = runs
    assert without.documents.equals(with_cache.documents)
    assert without.documents["text_hash"].notna().all()
    for (_, one), (_, other) in zip(with_cache.iter_documents(), without.iter_documents(), strict=True):
        for name in ("token", "pos", "phase"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        # Numerically the two differ, so a tie may be broken otherwise.
        assert (one.ids == other.ids).mean() > 0.99
    return without


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_without_a_cache(rows, tmp_path):
    run = assert_same_documents(prepared(), tmp_path, tokens(rows, 7), max_new_tokens=6)
    assert run.documents["n_tokens"].tolist() == [12] * rows


def test_generate_without_a_cache_from_left_padding(tmp_path):
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    run = assert_same_documents(prepared(), tmp_path, tokens(2, 7), attention_mask=mask, max_new_tokens=5)
    assert run.documents["n_tokens"].tolist() == [11, 8]


def test_generate_without_a_cache_where_rows_end(tmp_path):
    model, ids = prepared(), tokens(4, 8)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = int(free[0, 10])
    run = assert_same_documents(model, tmp_path, ids, max_new_tokens=8)
    assert run.documents["n_tokens"].min() < 15


def test_generate_without_a_cache_under_the_callers_numbers(tmp_path):
    model = prepared()
    with omnigene_fast.trace(model, tmp_path / "run") as tr:
        tr.label(doc_ids=[5, 3])
        model.generate(tokens(2, 7), max_new_tokens=4, do_sample=False, use_cache=False)
    assert [pos for _, pos in recorded(tmp_path / "run")] == [list(range(10))] * 2
    assert omnigene_fast.open_trace(tmp_path / "run").documents["doc_id"].tolist() == [3, 5]


def test_generate_without_a_cache_through_peft(tmp_path):
    model = prepared()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with omnigene_fast.trace(wrapped, tmp_path / "run"):
        wrapped.generate(input_ids=tokens(2, 7), max_new_tokens=4, do_sample=False, use_cache=False)
    assert [pos for _, pos in recorded(tmp_path / "run")] == [list(range(10))] * 2


def test_beams_without_a_cache(tmp_path):
    model, lengths = prepared(), []
    for use_cache in (True, False):
        with omnigene_fast.trace(model, tmp_path / str(use_cache)):
            model.generate(tokens(2, 5), max_new_tokens=5, num_beams=3, do_sample=False, use_cache=use_cache)
        lengths.append([len(pos) for _, pos in recorded(tmp_path / str(use_cache))])
    assert lengths == [[9] * 6] * 2


def test_sequences_that_differ_are_other_documents_of_a_generation(tmp_path):
    """Guidance runs a second prompt beside the first, each step anew."""
    model = prepared()
    with omnigene_fast.trace(model, tmp_path / "run"):
        options = {"negative_prompt_ids": tokens(1, 4, seed=5), "guidance_scale": 1.5, "do_sample": False}
        model.generate(tokens(1, 7), max_new_tokens=4, use_cache=False, **options)
    lengths = sorted(len(pos) for _, pos in recorded(tmp_path / "run"))
    assert lengths[-1] == 10, "the prompt once, and three of four new tokens"
    assert sum(lengths) <= 10 + 4 + 4


def test_a_loop_of_ones_own_without_a_cache_is_documents(tmp_path):
    """Nothing tells that a longer call goes on with the one before."""
    model, ids = prepared(), tokens(1, 8)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        model(ids[:, :6])
        model(ids)
        model.generate(ids, max_new_tokens=1, use_cache=False)
        model.generate(ids, max_new_tokens=1, use_cache=False)
    assert [len(pos) for _, pos in recorded(tmp_path / "run")] == [6, 8, 8, 8]


def test_chunked_prefill_and_a_second_turn(tmp_path):
    model, ids, turn = prepared(), tokens(1, 11), tokens(1, 3, seed=4)
    with omnigene_fast.trace(model, tmp_path / "run"):
        first = model.generate(
            ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=4, return_dict_in_generate=True
        )
        chat = torch.cat([first.sequences, turn], 1)
        second = model.generate(chat, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    ((token, pos),) = recorded(tmp_path / "run")
    assert token == second[0, :-1].tolist()
    assert pos == list(range(len(token)))


@pytest.mark.parametrize("seed", [0, 1])
def test_assisted_decoding_counts_what_is_in_the_text(seed, tmp_path):
    """Candidates that the model did not accept ran through it and are not recorded."""
    model, assistant = prepared(**WIDE), prepared(**WIDE)
    torch.manual_seed(seed)
    with torch.no_grad():
        head = assistant.lm_head.weight
        head.add_(torch.randn_like(head) * head.std(), alpha=0.3)
    ids, calls = tokens(1, 7), []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with omnigene_fast.trace(model, tmp_path / "run") as tr:
        text = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        tr.settle()
        assert tr.tokens == 18
    hook.remove()
    assert sum(calls) > 18, "no candidate was refused"
    assert len(calls) < 12, "no candidate was accepted"
    ((token, pos),) = recorded(tmp_path / "run")
    assert token == text[0, :-1].tolist()
    assert pos == list(range(18))


def test_prompt_lookup_and_a_second_turn(tmp_path):
    model, ids, turn = prepared(**WIDE), tokens(1, 4).repeat(1, 3), tokens(1, 3, seed=4)
    with omnigene_fast.trace(model, tmp_path / "run"):
        first = model.generate(
            ids, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
        )
        with torch.no_grad():
            model(torch.cat([first.sequences[:, -1:], turn], 1), past_key_values=first.past_key_values)
    ((token, pos),) = recorded(tmp_path / "run")
    assert token == first.sequences[0].tolist() + turn[0].tolist()
    assert pos == list(range(len(token)))


def test_a_cropped_cache_goes_on_in_a_document_of_its_own(tmp_path):
    model, ids = prepared(**WIDE), tokens(2, 12)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        cache = model(ids[:, :6], past_key_values=empty_cache(model)).past_key_values
        model(ids[:, 6:9], past_key_values=cache)
        cache.crop(-3)
        for at in range(9, 12):  # decoded one by one: one document, not three
            model(ids[:, at : at + 1], past_key_values=cache)
    prompt = [(row[:9].tolist(), list(range(9))) for row in ids]
    assert recorded(tmp_path / "run") == [*prompt, *((row[9:].tolist(), [6, 7, 8]) for row in ids)]


def test_positions_after_a_crop_leave_padding_out(tmp_path):
    model, ids = prepared(**WIDE), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        cache = model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=empty_cache(model)).past_key_values
        cache.crop(-2)
        model(ids[:, 8:], attention_mask=mask[:, :8], past_key_values=cache)
    assert [pos for _, pos in recorded(tmp_path / "run")] == [list(range(8)), list(range(4)), [6, 7], [2, 3]]


def test_one_prefix_and_several_copies_of_its_cache(tmp_path):
    model, ids = prepared(), tokens(3, 9)
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        cache = model(ids[:1, :6], past_key_values=empty_cache(model)).past_key_values
        twins = [copy.deepcopy(cache) for _ in range(2)]
        for at in range(6, 9):  # side by side
            for row, twin in enumerate(twins):
                model(ids[row : row + 1, at : at + 1], past_key_values=twin)
        model(ids[2:, 6:], past_key_values=cache)
    assert recorded(tmp_path / "run") == [
        (ids[0, :6].tolist() + ids[2, 6:].tolist(), list(range(9))),
        *((ids[row, 6:].tolist(), [6, 7, 8]) for row in range(2)),
    ]


def test_a_cache_of_another_trace(tmp_path):
    model, ids = prepared(), tokens(1, 9)
    with torch.no_grad():
        with omnigene_fast.trace(model):
            cache = model(ids[:, :5], past_key_values=empty_cache(model)).past_key_values
        model(ids[:, 5:6], past_key_values=cache)
        with omnigene_fast.trace(model, tmp_path / "run"):
            model(ids[:, 6:8], past_key_values=cache)
            model(ids[:, 8:], past_key_values=cache)
    assert recorded(tmp_path / "run") == [(ids[0, 6:].tolist(), [6, 7, 8])]


def after(change, rows, path, **options):
    """Documents of a batch of three whose cache was changed before it went on with `rows` rows."""
    model, ids, more = prepared(**options), tokens(3, 6), tokens(rows, 3, seed=9)
    with torch.no_grad(), omnigene_fast.trace(model, path):
        cache = model(ids, past_key_values=empty_cache(model)).past_key_values
        change(cache)
        model(more[:, :1], past_key_values=cache)
        model(more[:, 1:], past_key_values=cache)
    return ids.tolist(), more.tolist(), recorded(path)


def test_reordered_rows_stay_with_their_documents(tmp_path):
    ids, more, found = after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), 3, tmp_path / "run")
    assert found == [(ids[doc] + more[row], list(range(9))) for doc, row in ((0, 1), (1, 2), (2, 0))]


def test_selected_rows_stay_with_their_documents(tmp_path):
    ids, more, found = after(lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), 2, tmp_path / "run")
    six, nine = list(range(6)), list(range(9))
    assert found == [(ids[0] + more[0], nine), (ids[1], six), (ids[2] + more[1], nine)]


def test_repeated_rows_go_on_in_documents_of_their_own(tmp_path):
    ids, more, found = after(lambda cache: cache.batch_repeat_interleave(2), 6, tmp_path / "run")
    assert found == [*((row, list(range(6))) for row in ids), *((row, [6, 7, 8]) for row in more)]


def test_one_row_of_several(tmp_path):
    ids, more, found = after(lambda cache: cache.batch_select_indices(torch.tensor([1])), 1, tmp_path / "run")
    assert [len(token) for token, _ in found] == [6, 9, 6]
    assert found[1][0] == ids[1] + more[0]


def test_a_cache_that_another_text_was_put_into(tmp_path):
    """Rows that are none of those before: continuations of an unknown prefix."""

    def replace(cache):
        for layer in cache.layers:
            layer.keys, layer.values = torch.randn_like(layer.keys), torch.randn_like(layer.values)

    ids, more, found = after(replace, 3, tmp_path / "run")
    assert found == [*((row, list(range(6))) for row in ids), *((row, [6, 7, 8]) for row in more)]


def test_an_unchanged_cache_is_not_compared(monkeypatch, tmp_path):
    monkeypatch.setattr("omnigene_fast.tracing.calls._rows", lambda *_: pytest.fail("compared"))
    model = prepared()
    with omnigene_fast.trace(model, tmp_path / "run"):
        model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False)
        model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False, num_beams=2)


def test_rows_by_their_content():
    old = torch.randn(3, 2, 9, 4)
    old[2] = old[1]
    assert _rows(old, old.clone(), 9) == [0, 1, 2]
    assert _rows(old, old[[1, 0, 2]], 9) == [1, 0, 2]
    assert _rows(old, old[[0, 0]], 9) == [0, 0]
    assert _rows(old, old[:, :, 4:], 9) == [0, 1, 2]
    assert _rows(old, torch.randn(3, 2, 9, 4), 9) is None
    assert _rows(old, old[:, :1], 9) is None


def test_replay_of_generate_without_a_cache(tmp_path):
    model, ids = prepared(), tokens(2, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    with omnigene_fast.trace(model, tmp_path / "run"):
        text = model.generate(ids, **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.router.proj.weight.add_(torch.randn_like(layer.router.proj.weight), alpha=0.02)
    made = []

    def follow(given, scores):
        """The text of the trace, whatever the other model would write."""
        return torch.full_like(scores, -torch.inf).scatter(1, text[:, given.shape[1], None], 0.0)

    with omnigene_fast.replay(other, tmp_path / "run") as replay:
        hook = other.model.layers[0].router.register_forward_hook(lambda _m, _i, out: made.append(out[2]))
        other.generate(ids, logits_processor=[follow], **options)
    hook.remove()
    assert (replay.consumed, replay.remaining) == (22, 0)
    recorded_ids = next(omnigene_fast.open_trace(tmp_path / "run").iter_documents())[1].ids[0]
    assert np.array_equal(made[-1].view(2, 11, -1)[0], recorded_ids), "every step routes all as recorded"
