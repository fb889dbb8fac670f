"""A minute with the versions that are installed: accelerate, train a step, LoRA by PEFT, 8 bits, trace, report.

`tests/versions/run.sh oldest|newest` makes the environments. What cannot run because of a version is printed as
skipped, with the reason; anything else that goes wrong ends with an error.
"""

import importlib.metadata
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import omnigene_fast
from omnigene_fast import analysis, open_trace, trace

PACKAGES = "torch transformers numpy peft accelerate datasets pyarrow duckdb pandas plotly scipy click tqdm triton"


def small() -> Gemma4ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "moe_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    experts = {"num_experts": 16, "top_k_experts": 4, "enable_moe_block": True, "hidden_size_per_layer_input": 0}
    tokens = {"vocab_size": 300, "vocab_size_per_layer_input": 300, "pad_token_id": 0, "eos_token_id": None}
    more = {"sliding_window": 16, "max_position_embeddings": 128, "initializer_range": 0.1}
    return Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **heads, **experts, **tokens, **more))


def accelerated(ids: torch.Tensor) -> None:
    with torch.no_grad():
        stock = small().eval()(ids).logits
        fast = omnigene_fast.accelerate(small().eval())
        assert (fast(ids).logits - stock).abs().max() < 1e-3
        assert fast.generate(ids[:1], max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def trained(ids: torch.Tensor) -> None:
    from transformers import Trainer, TrainingArguments

    model = omnigene_fast.accelerate(small())
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    with tempfile.TemporaryDirectory() as out:
        quiet = {"report_to": [], "disable_tqdm": True, "save_steps": 99}
        arguments = TrainingArguments(out, max_steps=2, per_device_train_batch_size=2, use_cpu=True, **quiet)
        result = Trainer(model, arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 20


def adapted(ids: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj", "router.proj"], target_parameters=experts, lora_dropout=0.0)
    model = omnigene_fast.accelerate(get_peft_model(small(), config))
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def rounded(ids: torch.Tensor) -> None:
    with torch.no_grad():
        stock = small().eval()(ids).logits
        for format in ("int8", "fp8"):
            model = omnigene_fast.accelerate(small().eval(), experts_dtype=format)
            assert (model(ids).logits - stock).norm() < 0.3 * stock.norm()


def traced(ids: torch.Tensor) -> None:
    model = omnigene_fast.accelerate(small().eval())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with trace(model, Path(folder, "run"), record=("ids", "weights", "stats")) as tr:
            for number in range(6):
                tr.label(task=f"t{number % 2}")
                model((ids + 31 * number) % 300)
        run = open_trace(Path(folder, "run"))
        assert run.counts.sum() == 6 * ids.numel() * 3 * 4
        assert len(run.sql("select count(*) from documents").df()) == 1
        analysis.report(run, Path(folder, "report.html"), permutations=19, progress=False)
        assert Path(folder, "report.html").stat().st_size > 10_000


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)
    found = []
    for package in PACKAGES.split():
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    print(f"python {sys.version.split()[0]}, {', '.join(found)}")
    ids = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    for step in (accelerated, trained, adapted, rounded, traced):
        try:
            step(ids)
        except ImportError as error:
            if step is not adapted or "peft" not in str(error).lower():
                raise
            # A transformers that asks for a PEFT that is not released, which the message says.
            print(f"{step.__name__}: skipped: {' '.join(str(error).split())[:200]}")
        else:
            print(f"{step.__name__}: passed")


if __name__ == "__main__":
    main()
