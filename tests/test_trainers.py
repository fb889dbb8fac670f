"""The trainers that people use, each on an accelerated and on a stock model: `Trainer`, TRL's, the accelerate loop."""

import peft
import pytest
import torch
import transformers

import omnigene_fast

from . import helpers
from .helpers import moe_layers, tokens
from .test_training import RECIPES, pair


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, n):
        row = tokens(1, 24, seed=n % 8)[0]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def _history(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def _arguments(cls, tmp_path, **changes):
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "bf16": False,
    }
    return cls(**options | changes)


@pytest.mark.parametrize(
    ("recipe", "checkpointing", "bf16"),
    [
        ("full", None, False),
        ("full", "reentrant", True),
        ("full", "not reentrant", True),
        ("frozen experts", "not reentrant", True),
        ("lora on experts", "reentrant", False),
        ("lora on experts", "not reentrant", True),
    ],
)
def test_trainer(recipe, checkpointing, bf16, tmp_path):
    options = {"bf16": bf16, "gradient_checkpointing": checkpointing is not None}
    if checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    curves, autocast = [], set()
    for model in pair(recipe):
        router = moe_layers(model)[0].router
        router.register_forward_pre_hook(lambda *_: autocast.add(torch.is_autocast_enabled("cpu")))
        arguments = _arguments(transformers.TrainingArguments, tmp_path, **options)
        curves.append(_history(transformers.Trainer(model=model, args=arguments, train_dataset=Texts())))
    ours, stock = curves
    assert autocast == {bf16}
    assert ours.shape == stock.shape == (6,)
    assert ((ours - stock).abs() / stock).max() < (2e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("recipe", ["full", "lora on experts"])
def test_sft_trainer(recipe, tmp_path, monkeypatch):
    """TRL wraps the model in PEFT by itself; its loss reads no router logits."""
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{n}": n for n in range(helpers.VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), pad_token="t0", eos_token="t1"
    )
    data = datasets.Dataset.from_dict({"input_ids": [tokens(1, 24, seed=n % 8)[0].tolist() for n in range(16)]})
    built = []
    original = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args, **kwargs: built.append(1) or original(*args, **kwargs))
    curves = []
    for accelerated in (True, False):
        model, config = helpers.gemma4(), None
        if accelerated:
            omnigene_fast.accelerate(model)
        else:
            model.set_experts_implementation("eager")
        if RECIPES[recipe]:
            config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **RECIPES[recipe])
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=model,
            args=_arguments(trl.SFTConfig, tmp_path, max_length=24),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=config,
        )
        curves.append(_history(trainer))
        assert bool(built) == (not accelerated and config is not None)
    assert curves[0].shape == (6,)
    assert ((curves[0] - curves[1]).abs() / curves[1]).max() < 1e-4


def test_accelerate_library():
    """A loop of one's own with `Accelerator`: prepare, accumulate, clip."""
    from accelerate import Accelerator

    curves = []
    for model in pair("lora on experts"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        loader = torch.utils.data.DataLoader(Texts(), batch_size=2)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        curves.append([])
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            curves[-1].append(loss.item())
    ours, stock = torch.tensor(curves, dtype=torch.float64)
    assert ours.shape == (8,)
    assert ((ours - stock).abs() / stock).max() < 1e-4
