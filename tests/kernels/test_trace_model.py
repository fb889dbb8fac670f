"""A traced model on the Triton backend: what the other backends are tested for in tests/tracing/test_capture.py."""

import pytest
import torch

import omnigene_fast

from ..helpers import gemma4, tokens
from ..tracing.test_capture import Routers, assert_recorded, padded_batch, rows_of


@pytest.fixture
def model(device):
    return omnigene_fast.accelerate(gemma4().to(device), backend="triton")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(side, model, device, tmp_path):
    ids, mask = padded_batch(side)
    with torch.no_grad(), Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        model(ids.to(device), attention_mask=mask.to(device))
    assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask)])


def test_generate(model, device, tmp_path):
    ids, mask = padded_batch("left")
    model.generation_config.eos_token_id = None
    with Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=3, do_sample=False)
    steps = [{row: (row, int(mask[row].sum()) + step) for row in range(3)} for step in range(2)]
    assert_recorded(tmp_path / "run", made.forwards(), [rows_of(mask), *steps])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, model, device, tmp_path):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = tokens(2, 7).to(device)
    with Routers(model) as made, omnigene_fast.trace(model, tmp_path / "run"):
        model(ids, labels=ids).loss.backward()
    assert_recorded(tmp_path / "run", list(made.forwards())[:1], [rows_of(torch.ones(2, 7))])


def test_packed_and_compiled(model, device, tmp_path):
    ids, position = tokens(1, 9).to(device), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), Routers(model) as made:
        model(ids, position_ids=position)
    with torch.no_grad(), omnigene_fast.trace(compiled, tmp_path / "run"):
        compiled(ids, position_ids=position)
    keep = {row: (int(row >= 4), int(position[0, row])) for row in range(9)}
    assert_recorded(tmp_path / "run", made.forwards(), [keep])


def test_replay_is_bit_equal(model, device, tmp_path):
    """31: slime replayed in another order, and sums in bfloat16 changed."""
    ids, mask = padded_batch()
    with torch.no_grad(), omnigene_fast.trace(model, tmp_path / "run"):
        logits = model(ids.to(device), attention_mask=mask.to(device)).logits
    with torch.no_grad(), omnigene_fast.replay(model, tmp_path / "run") as again:
        assert torch.equal(model(ids.to(device), attention_mask=mask.to(device)).logits, logits)
    assert again.remaining == 0
