"""Fine-tune a Gemma-4 MoE with LoRA: transformers, PEFT and Trainer, accelerated by one line.

The recipe is that of OmniGene-4's continued pre-training and instruction tuning: LoRA r=64, alpha=128 on attention,
dense MLP and router.proj, the embedding trained in full, experts frozen, gradient checkpointing, bfloat16.

    python examples/train_lora.py --compare                          a small random model on the shipped sequences
    python examples/train_lora.py --model CKPT --data my.jsonl --steps 500 --out adapter
    python examples/train_lora.py --model CKPT --data qa.jsonl --answer-only        columns "prompt" and "response"
    python examples/train_lora.py --compare --experts lora           LoRA on the experts too
    python examples/train_lora.py --model CKPT --merged NEXT         a checkpoint, the --model of the next stage
    python examples/train_lora.py --router-every 10                  how evenly the experts are loaded, as it trains
    torchrun --nproc_per_node 2 examples/train_lora.py --fsdp        two processes: DDP, or FSDP2 with --fsdp

--compare trains the same model on the same batches without the accelerator too; --stock does that alone.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import omnigene_fast
from omnigene_fast.demo.model import BOS, EOS, PAD, Size, byte_ids, load_texts, small_model
from omnigene_fast.demo.training import IGNORED, Plan, Run, Sample, chunks, join, train, wait

SMALL = Size(H=256, I=64, E=32, K=4, layers=4)
# Linears of the language model; PEFT matches the ends of module names, so "mlp." keeps them apart from the experts.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "router.proj"]
EXPERTS = ("gate_up_proj", "down_proj")  # the experts' parameters
TOWERS = r".*(vision_tower|audio_tower|embed_vision|embed_audio).*"

CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Read the arguments, train once or twice, report; what came of it as "stock" and "accelerated"."""
    options = arguments(argv)
    check(options)
    rank, world = join()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU
    if options.threads:
        torch.set_num_threads(options.threads)
    # The samples before the checkpoint's weights: a mistake in the data costs seconds, not minutes.
    tokenizer = None if options.model is None else load_tokenizer(options.model)
    samples = read_samples(options, tokenizer)
    runs: dict[str, Run] = {}
    # Accelerated first: it pays for what a process needs once, and its adapter is safe if stock runs out of memory.
    for name in ("accelerated", "stock") if options.compare else ("stock" if options.stock else "accelerated",):
        model = build_model(options, device, accelerated=name == "accelerated")
        if not runs and rank == 0:
            describe(model, samples, options, fused_loss(model, device), world)
        plan = Plan(
            steps=options.steps,
            batch=options.batch,
            accumulate=options.accumulate,
            learning_rate=options.lr,
            bf16=options.dtype == "bfloat16",
            liger=fused_loss(model, device),
            optimizer=options.optimizer,
            seed=options.seed,
            fsdp=options.fsdp,
        )
        pad = PAD if tokenizer is None else tokenizer.pad_token_id
        watch = [omnigene_fast.RouterTraceCallback(options.router_every)] if options.router_every else []
        runs[name] = train(model, samples, plan, pad=pad, title=name, callbacks=watch)
        if len(runs) == 1 and (options.out or options.merged):
            keep(whole(model, options, rank) if options.fsdp else model, options, tokenizer, rank)
        del model
    runs = dict(sorted(runs.items(), reverse=True))
    if rank == 0:
        report(runs)
        if options.router_every:
            report_load(next(reversed(runs.values())))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            picture(runs, options.out / "loss.png")
    return runs


def build_model(options: argparse.Namespace, device: torch.device, *, accelerated: bool) -> Any:
    """The checkpoint or the small random model, wrapped by PEFT; the same weights and adapters for the same seed."""
    require()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    else:
        model = small_model(SMALL, device, options.seed)[0].to(dtype)
    experts = {"target_parameters": [f"experts.{name}" for name in EXPERTS]} if options.experts == "lora" else {}
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=TARGETS,
        exclude_modules=TOWERS,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,  # Gemma-4's output layer is its embedding: both train, as one
        task_type="CAUSAL_LM",
        **experts,
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if options.experts == "full" and name.endswith(tuple(f"experts.{each}" for each in EXPERTS)):
            parameter.requires_grad = True
    # The line this example is about. It may come before PEFT or after; what cannot be accelerated raises here.
    if accelerated:
        omnigene_fast.accelerate(model, save=options.save)
    return model


def whole(model: Any, options: argparse.Namespace, rank: int) -> Any:
    """What FSDP2 has sharded as a model of whole tensors, on the CPU of the first process; None on the others."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = parameter.detach().full_tensor()  # every process takes part
            if rank == 0:
                trained[name] = tensor.cpu()
    if rank:
        return None
    made = build_model(options, CPU, accelerated=False)
    unknown = made.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"--fsdp: expected the parameters of the unsharded model, got {unknown[0]} too.")
    return made


def keep(model: Any, options: argparse.Namespace, tokenizer: Any, rank: int) -> None:
    """Write what was trained: the adapter into --out, the merged checkpoint as --merged; uses up `model`."""
    if rank == 0 and options.out and options.experts != "full":
        model.save_pretrained(options.out)
        print(f"adapter: {options.out} (PeftModel.from_pretrained(base, {str(options.out)!r}))")
    if rank == 0 and options.merged:
        # With transformers' own forwards and names; what was trained in float32 gets the checkpoint's dtype.
        merged = omnigene_fast.restore(model).merge_and_unload().to(getattr(torch, options.dtype))
        beside = options.merged.with_name(options.merged.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        merged.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for part in options.model.glob("*processor_config.json"):  # of images, where the model sees them
            shutil.copy(part, beside)
        shutil.rmtree(options.merged, ignore_errors=True)
        beside.rename(options.merged)  # whole or not there
        print(f"checkpoint: {options.merged} (AutoModelForCausalLM.from_pretrained({str(options.merged)!r}))")
    wait()  # so that the others find it


def read_samples(options: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    """The data as token ids and labels: documents in pieces of --length tokens, or prompts with their responses."""
    wanted = ["prompt", "response"] if options.answer_only else [options.text_col]
    if options.data and not options.data.is_file():
        raise ValueError(f"--data: expected a jsonl file, got {options.data}.")
    if options.data is None:
        rows = [{options.text_col: text} for family in load_texts(10**6).values() for text in family]
    else:
        rows = [parse(line, number) for number, line in enumerate(options.data.read_text().splitlines(), 1) if line]
    samples: list[Sample] = []
    long = 0
    for number, row in enumerate(rows, 1):
        for column in wanted:
            if not isinstance(row.get(column), str):
                raise ValueError(f"--data: expected a text column {column!r} in row {number}, got {', '.join(row)}.")
        first, *rest = (ids(row[column], tokenizer, begin=column == wanted[0]) for column in wanted)
        if not options.answer_only:
            samples += chunks(first, options.length)
            continue
        both = [*first, *rest[0], EOS if tokenizer is None else tokenizer.eos_token_id]
        labels = [IGNORED] * len(first) + both[len(first) :]
        if len(first) < options.length:  # else nothing of the answer would be left
            samples.append({"input_ids": both[: options.length], "labels": labels[: options.length]})
        else:
            long += 1
    if long and not samples:
        raise ValueError(f"--length: expected more tokens than a prompt has, got {options.length}, and all are longer.")
    if long and join()[0] == 0:
        print(f"left out: {long:,} of {len(rows):,} prompts, which have {options.length} tokens (--length) or more")
    if not samples:
        raise ValueError(f"--data: expected texts of at least two tokens, got none in {options.data}.")
    return samples


def parse(line: str, number: int) -> dict[str, Any]:
    """One row of a jsonl file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--data: expected one JSON object per line, line {number} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"--data: expected one JSON object per line, line {number} is a {type(row).__name__}.")
    return row


def ids(text: str, tokenizer: Any, *, begin: bool) -> list[int]:
    """Token ids, with the begin-of-sequence token if `begin`; bytes where there is no tokenizer."""
    if tokenizer is None:
        return [BOS] * begin + byte_ids(text)
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id] * (begin and tokenizer.bos_token_id is not None) + encoded


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer; ValueError if the directory holds no checkpoint."""
    if not (path / "config.json").is_file():
        raise ValueError(f"--model: expected a checkpoint directory with a config.json, got {path}.")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fused_loss(model: Any, device: torch.device) -> bool:
    """Whether liger-kernel's fused linear cross-entropy, which knows the softcap, can run: it never makes the logits.

    Gemma-4's vocabulary makes them the largest tensor of a step. Liger needs a GPU and a version that knows the model.
    """
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model.get_base_model().config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def describe(model: Any, samples: list[Sample], options: argparse.Namespace, fused: bool, world: int) -> None:
    """Say what is about to happen in `world` processes."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    what = options.model or "a small random Gemma-4 MoE with byte tokens"
    print(f"model: {what}, {total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained, {options.dtype}")
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    print(f"data: {options.data or 'shipped sequences, 12 families'}, {len(samples):,} samples, {tokens:,} tokens")
    softcap = model.get_base_model().config.get_text_config().final_logit_softcapping
    print(f"loss: {'fused linear cross-entropy of liger-kernel' if fused else 'of transformers'}, softcap {softcap}")
    if world > 1:
        print(f"processes: {world}, {'FSDP2' if options.fsdp else 'DDP'}, {options.batch} samples in the batch of each")
    how = {"lora": "LoRA", "full": "trained in full"}.get(options.experts, "frozen")
    print(f"experts: {how}, {'stock' if options.stock else f'accelerate(save={options.save!r})'}\n", flush=True)


def report(runs: dict[str, Run]) -> None:
    """Losses side by side, then tokens/s and peak memory."""
    count = max(len(run.losses) for run in runs.values())
    shown = sorted({0, 1, 2, *range(4, count, max(1, count // 10)), count - 1} & set(range(count)))
    print(f"\n  {'step':>6}" + "".join(f"{name:>14}" for name in runs))
    for step in shown:
        print(f"  {step + 1:>6}" + "".join(f"{run.losses[step]:>14.6f}" for run in runs.values()))
    if len(runs) == 2:
        print(f"\nlosses: largest relative difference over {count} steps {difference(runs):.1e}")
    print(f"\n  {'':<12}{'tokens/s':>10}{'peak MB beyond the model':>26}")
    for name, run in runs.items():
        peak = "not known" if run.peak is None else f"{run.peak / 1e6:,.0f}"
        print(f"  {name:<12}{run.speed:>10,.0f}{peak:>26}")
    if len(runs) == 2:
        print(f"\nspeed-up of the whole training step: {runs['accelerated'].speed / runs['stock'].speed:.2f}x")
        if not torch.cuda.is_available():
            print("memory on the CPU is growth of the process, with what oneDNN keeps for the shapes that it has met")


def report_load(run: Run) -> None:
    """How evenly the experts were loaded, step by step: what the callback gives to any of Trainer's loggers."""
    names = ("max_vio_mean", "cv_p50", "dead_fraction", "effective_experts", "tokens")
    print("\nload of the experts (MaxVio: busiest over mean, minus 1; CV: spread over mean), over layers")
    print(f"\n  {'step':>6}" + "".join(f"{name:>19}" for name in names))
    for log in run.logs:
        if "router/entropy" in log:
            print(f"  {log['step']:>6}" + "".join(f"{log[f'router/{name}']:>19,.4g}" for name in names))


def difference(runs: dict[str, Run]) -> float:
    """The largest relative difference between the two loss curves."""
    pairs = zip(runs["stock"].losses, runs["accelerated"].losses, strict=True)
    return max(abs(ours - stock) / abs(stock) if math.isfinite(ours) else math.inf for stock, ours in pairs)


def picture(runs: dict[str, Run], path: Path) -> None:
    """The loss curves as a PNG, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("picture: none, matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"stock": {"color": "#0072B2", "lw": 4, "alpha": 0.4}, "accelerated": {"color": "#D55E00", "lw": 1.4}}
    for name, run in sorted(runs.items(), reverse=True):
        axis.plot(range(1, len(run.losses) + 1), run.losses, label=f"{name}, {run.speed:,.0f} tokens/s", **styles[name])
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="Gemma-4 MoE checkpoint directory; a small random model by default")
    add("--data", type=Path, help="jsonl file; by default sequences and prose of 12 families that come along")
    add("--text-col", default="text", help="column of --data with the text (default: text)")
    add("--answer-only", action="store_true", help="columns prompt and response; only the response is learned")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--stock", action="store_true", help="train without the accelerator")
    ways.add_argument("--compare", action="store_true", help="train with the accelerator and without it, side by side")
    add("--experts", choices=("frozen", "lora", "full"), default="frozen", help="what of the experts is trained")
    add("--save", choices=("preactivation", "input"), default="preactivation", help="what the experts' backward keeps")
    for name, default in (("steps", 30), ("batch", 4), ("accumulate", 1), ("length", 256), ("rank", 64)):
        add(f"--{name}", type=positive, default=default, help=f"default: {default}")
    add("--router-every", type=positive, help="steps between two measurements of the experts' load; none by default")
    add("--alpha", type=positive, help="of LoRA (default: twice the rank)")
    add("--lr", type=float, help="learning rate, constant after 5 steps (default: 2e-4; 2e-3 for the random model)")
    add("--optimizer", default="adamw_torch", help="as TrainingArguments' optim, e.g. paged_adamw_8bit")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--seed", type=int, default=0)
    add("--threads", type=positive, help="CPU threads")
    add("--fsdp", action="store_true", help="under torchrun: FSDP2 in place of DDP")
    add("--out", type=Path, help="directory for the adapter and a picture of the losses")
    add("--merged", type=Path, help="directory for the merged checkpoint with its tokenizer, replaced if it exists")
    options = parser.parse_args(argv)
    options.alpha = options.alpha or 2 * options.rank
    options.lr = options.lr or (2e-4 if options.model else 2e-3)
    return options


def require() -> None:
    """ImportError with the command that installs what training needs, if it is missing."""
    for name in ("peft", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed; install it with: pip install peft accelerate")


def check(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together, ImportError for a missing package, before anything is loaded."""
    require()
    for name, path in (("--out", options.out), ("--merged", options.merged)):
        if path and path.exists() and not path.is_dir():
            raise ValueError(f"{name}: expected a directory, got {path}.")
    if options.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError("--fsdp: expected several processes, got one; start them with torchrun --nproc_per_node 2.")
    if options.merged and not options.model:
        raise ValueError("--merged: expected with --model, whose tokenizer the checkpoint gets, got no --model.")
    if options.merged and options.merged.resolve() == options.model.resolve():
        raise ValueError(f"--merged: expected another directory than --model, got {options.merged}.")
    if options.experts == "full" and options.out and not options.merged:
        raise ValueError("--experts full: expected --merged with --out, because an adapter does not hold the experts.")


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT reads a renamed attribute
    try:
        main()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        sys.exit("train_lora: " + " ".join(str(error).split()))
