"""Answers to questions: one batched prefill, `generate` beside it, and training on the answers before."""

import argparse
from collections.abc import Sequence
from typing import Any

import shared
import torch
from shared import ACCELERATED, STOCK, Question, Results
from torch import Tensor


def tuning(made: argparse.ArgumentParser, steps: int) -> None:
    """Add the options of `tuned`; `steps` is what the small model gets by default."""
    made.add_argument("--steps", type=int, help=f"training steps before (default: {steps}; with --model none)")
    made.add_argument("--lr", type=float, help="learning rate (default: 2e-4; 2e-3 for the small model)")
    made.set_defaults(small_steps=steps)


def prompt_batches(
    tokenizer: Any, questions: Sequence[Question], size: int, device: torch.device
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Questions as batches, longest first, padded on the left: (numbers of the questions, the model's inputs)."""
    ids = [prompt_ids(tokenizer, question.prompt) for question in questions]
    order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
    return [
        (numbers, shared.padded([ids[n] for n in numbers], tokenizer.pad_token_id, device))
        for numbers in (order[at : at + size] for at in range(0, len(order), size))
    ]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids behind the begin-of-sequence token, where the tokenizer has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def first_tokens(tokenizer: Any, answers: Sequence[str]) -> list[int]:
    """The first token of each answer; ValueError unless they differ, because a prefill sees that one alone."""
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
    if len(set(first)) < len(first):
        raise ValueError(f"answers: expected another first token of each, got {', '.join(map(repr, answers))}.")
    return first


def margins(model: Any, inputs: dict[str, Tensor], first: Sequence[int]) -> Tensor:
    """Logit of the first answer less that of the second, [B] float32: above 0 the model answers the first.

    One prefill without a generation loop: the logits of the last position are those that `generate` would take.
    """
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return (logits[:, first[0]] - logits[:, first[1]]).cpu()


def generated(model: Any, tokenizer: Any, inputs: dict[str, Tensor], tokens: int) -> list[str]:
    """What greedy `generate` says after each prompt."""
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def tuned(options: argparse.Namespace, questions: Sequence[Question], results: Results) -> tuple[Any, Any]:
    """The model and the tokenizer of `load`, after --steps steps of LoRA on the answers to `questions`.

    The recipe is that of train_lora, its adapters merged at the end. With --compare two models are trained from the
    same seeds; their losses go into a table, and the accelerated one is returned.
    """
    steps = options.steps if options.steps is not None else 0 if options.model else options.small_steps
    if steps <= 0:
        return shared.load(options)
    shared.need("peft")
    import train_lora
    from transformers import AutoConfig

    from omnigene_fast.demo.training import IGNORED, Plan, train

    path = shared.checkpoint(options)
    tokenizer = shared.load_tokenizer(path)
    samples = []
    for question in questions:
        prompt = prompt_ids(tokenizer, question.prompt)
        answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        samples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    dtype = options.dtype
    if dtype == "auto":
        dtype = str(AutoConfig.from_pretrained(path).get_text_config().dtype or torch.float32).removeprefix("torch.")
    recipe = argparse.Namespace(
        model=path,
        dtype=dtype,
        seed=options.seed,
        rank=64,
        alpha=128,
        save="preactivation",
        experts="frozen",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs: dict[str, Any] = {}
    model = None
    for way in shared.ways(options):
        model = None  # the one before goes first: two of them need not fit
        model = train_lora.build_model(recipe, device, accelerated=way == ACCELERATED)
        plan = Plan(
            steps=steps,
            batch=options.batch,
            # At 5e-3 the small model magnifies rounding: after 40 steps the two ways' losses were 5 % apart.
            learning_rate=options.lr or (2e-4 if options.model else 2e-3),
            bf16=dtype == "bfloat16",
            liger=train_lora.fused_loss(model, device),
            seed=options.seed,
        )
        runs[way] = train(model, samples, plan, pad=tokenizer.pad_token_id, title=f"training, {way}")
    results.table(
        "Training on the answers",
        [{**row, "last loss": runs[row["way"]].losses[-1]} for row in shared.side_by_side(runs)],
        f"{len(samples)} questions, {steps} steps of {options.batch}; the loss is that of the answer's tokens alone."
        + loss_differences(runs),
    )
    return shared.switch(model, STOCK).merge_and_unload().eval(), tokenizer


def loss_differences(runs: dict[str, Any]) -> str:
    """How far the losses of two ways are apart, as a sentence; nothing where there is one way."""
    if len(runs) < 2:
        return ""
    both = zip(runs[STOCK].losses, runs[ACCELERATED].losses, strict=True)
    apart = [abs(ours - stock) / max(abs(stock), 1e-12) for stock, ours in both]
    return (
        f" Losses differ by at most {max(apart[:10]):.1e} in the first ten steps, {max(apart):.1e} in all (relative)."
    )


def asked(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    words: tuple[str, str],
    options: argparse.Namespace,
    results: Results,
) -> tuple[list[float], float]:
    """The margin of the first of two answers over the second for every question, and the seconds that it took.

    The margins come from one prefill a batch. Tables show the ways side by side, and what `generate` says and takes.
    """
    from tqdm import tqdm

    first = first_tokens(tokenizer, words)
    batches = prompt_batches(tokenizer, questions, options.batch, next(model.parameters()).device)
    order = [number for numbers, _ in batches for number in numbers]

    def tokens(batch: Any) -> int:
        return int(batch[1]["attention_mask"].sum())

    made = shared.each_way(model, options, batches, lambda batch: margins(model, batch[1], first), tokens)
    found = {
        way: torch.empty(len(order)).index_copy(0, torch.tensor(order), torch.cat(one.values))
        for way, one in made.items()
    }
    note = ""
    if len(found) == 2:
        same = int(((found[STOCK] > 0) == (found[ACCELERATED] > 0)).sum())
        apart = (found[STOCK] - found[ACCELERATED]).abs().max().item()
        largest = found[STOCK].abs().max().item()
        note = f"Answers equal: {same} of {len(order)}; margins up to {largest:.3g} differ by at most {apart:.1e}."
    results.table(f"{len(order)} questions, one prefill each", shared.side_by_side(made), note)

    way, prefill = list(made.items())[-1]
    longest = 1 + max(len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words)
    texts: dict[int, str] = {}
    spent = {"one prefill": 0.0, f"generate, {longest} tokens": 0.0}
    calls = (lambda inputs: margins(model, inputs, first), lambda inputs: generated(model, tokenizer, inputs, longest))
    calls[1](batches[0][1])  # warms up
    for numbers, inputs in tqdm(batches, desc="prefill and generate", unit="batch"):
        for name, call in zip(spent, calls, strict=True):
            begin = shared.now(inputs["input_ids"].device)
            said = call(inputs)
            spent[name] += shared.now(inputs["input_ids"].device) - begin
        texts |= dict(zip(numbers, (text.strip() for text in said), strict=True))
    valid = [number for number, text in texts.items() if text.startswith(words)]
    agree = sum(texts[number].startswith(words[found[way][number].item() <= 0]) for number in valid)
    rows: list[dict[str, Any]] = [{"answers by": name, "seconds": seconds} for name, seconds in spent.items()]
    rows[1] |= {"to the prefill": f"{rows[1]['seconds'] / rows[0]['seconds']:.2f}x"}
    rows[0] |= {"valid": f"{len(order)} of {len(order)}"}
    rows[1] |= {"valid": f"{len(valid)} of {len(order)}", "same answer": f"{agree} of {len(valid)}"}
    note = f"Both {way}, in turn, in batches of {options.batch}; valid: the text begins with {' or '.join(words)}."
    results.table("One prefill against generate", rows, note)
    return found[way].tolist(), prefill.seconds
