"""The Trainer callback: nine scalars in every logger's log, from the step's own counts."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import omnigene_fast
from omnigene_fast.tracing.callback import load_scalars

from ..helpers import EXPERTS, TOP_K, gemma4, moe_layers, tokens

LOAD = ["max_vio_mean", "max_vio_max", "cv_p50", "cv_p95", "dead_fraction", "entropy", "effective_experts"]
NAMES = {f"router/{name}" for name in (*LOAD, "tokens", "dropped")}


class Logger(TrainerCallback):
    """Stands before ours in Trainer's list, as every integration does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


def our_hooks(model):
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return [hook for hook in hooks if any(word in repr(hook) for word in ("omnigene_fast", "Watch", "_record_by_hook"))]


def train(tmp_path, callback, *, steps=5, accelerated=True, **options):
    model = gemma4()
    if accelerated:
        omnigene_fast.accelerate(model)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(16, 12)]
    for row in data[::2]:
        row["attention_mask"] = torch.cat([torch.ones(9), torch.zeros(3)]).long()
    logger = Logger()
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1000,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[logger, callback])
    trainer.train()
    return trainer, logger


@pytest.mark.parametrize("accelerated", [True, False])
def test_scalars_reach_every_logger(tmp_path, accelerated):
    trainer, logger = train(tmp_path, omnigene_fast.RouterTraceCallback(every=2), accelerated=accelerated)
    measured = [log for log in logger.logs if "router/entropy" in log]
    assert [log["step"] for log in measured] == [1, 3, 5]
    for log in measured:
        assert {name for name in log if name.startswith("router/")} == NAMES
        assert len(NAMES) <= 10
        assert "loss" in log
        # 4 rows of 12 tokens, the even ones with 3 of padding; the second forward of checkpointing does not count.
        assert 36 <= log["router/tokens"] <= 48
        assert np.log(TOP_K) <= log["router/entropy"] <= np.log(EXPERTS)
    history = [log for log in trainer.state.log_history if "router/entropy" in log]
    assert [log["router/entropy"] for log in history] == [log["router/entropy"] for log in measured]
    assert our_hooks(trainer.model) == []


def test_the_measured_steps_may_be_kept(tmp_path):
    train(tmp_path, omnigene_fast.RouterTraceCallback(every=3, path=tmp_path / "run", labels={"stage": "cpt"}))
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.verify() == []
    assert len(run.documents) == 2 * 4
    assert set(run.documents["stage"]) == {"cpt"}


@pytest.mark.parametrize("fault", ["nothing seen", "no disk"])
def test_a_step_that_cannot_be_measured_does_not_stop_training(fault, tmp_path, monkeypatch, caplog):
    from omnigene_fast.tracing import calls, manifest

    path = None
    if fault == "nothing seen":
        monkeypatch.setattr(calls.Watch, "_before", lambda *_: None)
    else:
        path = tmp_path / "run"
        monkeypatch.setattr(manifest, "write_segment", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space")))
    trainer, logger = train(tmp_path, omnigene_fast.RouterTraceCallback(every=2, path=path), steps=2)
    assert trainer.state.global_step == 2
    assert any("router/entropy" in log for log in logger.logs) == (fault == "no disk")
    assert "this step is not measured" in caplog.text
    assert our_hooks(trainer.model) == []


@pytest.mark.parametrize("accelerated", [True, False])
def test_training_that_fails_leaves_a_model_that_trains_again(accelerated, tmp_path):
    class Stop(TrainerCallback):
        failing = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.failing:
                raise ZeroDivisionError

    stop, callback = Stop(), omnigene_fast.RouterTraceCallback(every=1)
    trainer, _ = train(tmp_path, callback, steps=1, accelerated=accelerated)
    trainer.add_callback(stop)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    stop.failing = False
    trainer.train()
    assert our_hooks(trainer.model) == []
    assert all(getattr(block.router, "_omnigene_fast_trace", None) is None for block in moe_layers(trainer.model))
    assert sum("router/entropy" in log for log in trainer.state.log_history) >= 1


def test_scalars_by_hand():
    counts = np.array([[4, 4, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    found = load_scalars(counts)
    assert found["router/max_vio_mean"] == pytest.approx((1 + 3) / 2)
    assert found["router/max_vio_max"] == pytest.approx(3)
    assert found["router/dead_fraction"] == pytest.approx(5 / 8)
    assert found["router/entropy"] == pytest.approx(np.log(2) / 2)
    assert found["router/effective_experts"] == pytest.approx(1.5)
    assert found["router/cv_p50"] == pytest.approx((1 + np.sqrt(3)) / 2)
    assert load_scalars(np.zeros((2, 4), int)) == {}


@pytest.mark.parametrize("every", [0, 1.5, "100"])
def test_every_must_be_a_count(every):
    with pytest.raises(ValueError, match="every: expected an integer >= 1"):
        omnigene_fast.RouterTraceCallback(every)


def test_a_model_that_no_trace_takes_is_trained_unmeasured(tmp_path, caplog):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["router"])
    model = get_peft_model(omnigene_fast.accelerate(gemma4()), lora)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[omnigene_fast.RouterTraceCallback(every=1)])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "this step is not measured" in caplog.text
    assert "modules_to_save" in caplog.text
