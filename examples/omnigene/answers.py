"""Answers to questions: one batched prefill, `generate` beside it, and training on the answers before."""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import shared
import torch
from prompts import decoded, prompt_batches, said, sample, token_ids
from shared import ACCELERATED, STOCK, Question, Results
from torch import Tensor


def parser(doc: str, out: str, limit: str) -> argparse.ArgumentParser:
    """The options of `shared.parser`, those of `tuned`, and --limit, which `limit` explains."""
    made = shared.parser(doc, out, small_steps=40)
    made.add_argument("--steps", type=shared.natural, help="training steps before (default: 40; with --model none)")
    made.add_argument("--lr", type=float, help="learning rate (default: 2e-4; 1e-3 for the small model)")
    made.add_argument("--limit", type=int, help=f"{limit}, at least 2 (default: all)")
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None, least: str) -> argparse.Namespace:
    """The command line; ValueError for a --limit below 2, with what 2 of them are the `least` of."""
    options = made.parse_args(argv)
    if options.limit is not None and options.limit < 2:
        raise ValueError(f"--limit: expected at least 2 {least}, got {options.limit}.")
    return options


def margins(model: Any, inputs: dict[str, Tensor], first: Tensor) -> Tensor:
    """Logit of the first candidate less that of the second, [B] float32: above 0 the model answers the first.

    One prefill without a generation loop: the logits of the last position are those that `generate` would take.
    """
    with torch.no_grad():
        return margin(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1], first)


def margin(logits: Tensor, first: Tensor) -> Tensor:
    """The two candidates' difference, [B] float32 on the CPU, of logits [B, V]."""
    chosen = logits.float().gather(1, first).cpu()
    return chosen[:, 0] - chosen[:, 1]


def generated(model: Any, tokenizer: Any, inputs: dict[str, Tensor], tokens: int) -> tuple[list[str], Tensor]:
    """Prompts with what greedy `generate` adds, and its logits [B, V] of the first new token."""
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return [decoded(tokenizer, row) for row in out.sequences], out.logits[0]


def tuned(options: argparse.Namespace, questions: Sequence[Question], results: Results) -> tuple[Any, Any]:
    """The model and the tokenizer of `load`, after --steps steps of LoRA on the answers to `questions`.

    The recipe is that of train_lora, its adapters merged at the end. With --compare two models are trained from the
    same seeds; their losses go into a table, and what the accelerated one has learned is returned.
    """
    steps = options.steps if options.steps is not None else 0 if options.model else options.small_steps
    if steps <= 0:
        return shared.load(options)
    shared.need("peft")
    import train_lora

    from omnigene_fast.demo.training import Plan, train

    path = shared.checkpoint(options)
    tokenizer = shared.load_tokenizer(path)
    samples = [sample(tokenizer, question) for question in questions]
    dtype = shared.dtype_of(options, path)
    recipe = argparse.Namespace(model=path, dtype=dtype, seed=options.seed, rank=64, alpha=128, experts="frozen")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs: dict[str, Any] = {}
    model = learned = None
    for way in reversed(shared.ways(options)):  # the accelerated one first, as in train_lora
        model = None  # the one before goes first: two of them need not fit
        model = shared.switch(train_lora.build_model(recipe, device, accelerated=False), way)
        plan = Plan(
            steps=steps,
            batch=options.batch,
            # At 5e-3 the small model magnifies rounding: after 40 steps the two ways' losses were 5 % apart.
            learning_rate=options.lr or (2e-4 if options.model else 1e-3),
            bf16=dtype == "bfloat16",
            liger=train_lora.fused_loss(model, device),
            seed=options.seed,
        )
        runs[way] = train(model, samples, plan, pad=tokenizer.pad_token_id, title=f"training, {way}")
        if learned is None:
            learned = {name: tensor.cpu().clone() for name, tensor in trained(model)}
    runs = {way: runs[way] for way in shared.ways(options)}
    with torch.no_grad():  # everything else is the same: the second model becomes the first one
        for name, tensor in trained(model):
            tensor.copy_(learned[name])
    results.table(
        "Training on the answers",
        [{**row, "last loss": runs[row["way"]].losses[-1]} for row in shared.side_by_side(runs)],
        f"{len(samples)} questions, {steps} steps of {options.batch}; the loss is that of the answer's tokens alone."
        + f" {shared.check_losses(results, runs, dtype)}".rstrip(),
    )
    return shared.switch(model, STOCK).merge_and_unload().eval(), tokenizer


def trained(model: Any) -> list[tuple[str, Tensor]]:
    """The parameters of a model that train, with their names."""
    return [(name, each.detach()) for name, each in model.named_parameters() if each.requires_grad]


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
    In float32 it is a fault of the results if an answer depends on the way, or on being generated.
    """
    device = next(model.parameters()).device
    batches = prompt_batches(tokenizer, questions, words, options.batch, device)
    exact = shared.dtype_of(options, shared.checkpoint(options)) == "float32"
    made = shared.each_way(
        model,
        options,
        batches,
        lambda batch: margins(model, *batch[1:]),
        lambda batch: int(batch[1]["attention_mask"].sum()),
    )
    order = torch.tensor([number for numbers, *_ in batches for number in numbers])
    found = {way: torch.empty(len(order)).index_copy(0, order, torch.cat(one.values)) for way, one in made.items()}
    note = agreement(found, exact, results)
    results.table(f"{len(order)} questions, one prefill each", shared.side_by_side(made), note)
    way, prefill = list(made.items())[-1]
    beside_generate(model, tokenizer, questions, words, batches, found[way], way, exact, results)
    return found[way].tolist(), prefill.seconds


def agreement(found: dict[str, Tensor], exact: bool, results: Results) -> str:
    """How far the margins [N] of the ways agree, as sentences; what must not be becomes a fault."""
    for way, values in found.items():
        wrong = int((~values.isfinite()).sum())
        if wrong:
            results.fault(f"{wrong} of {len(values)} margins of the {way} model are not finite.")
    nearest = torch.stack(list(found.values())).abs().amin(0)
    if len(found) < 2:
        return f"Margins of exactly 0, which count as the second answer: {int((nearest == 0).sum())}."
    stock, ours = found[STOCK], found[ACCELERATED]
    same = int(((stock > 0) == (ours > 0)).sum())
    apart = (stock - ours).abs().max().item()
    if exact and same < len(stock):
        results.fault(f"{len(stock) - same} of {len(stock)} answers of the accelerated model are not the stock one's.")
    ties = int(((nearest < apart) | (nearest == 0)).sum())
    return (
        f"Answers equal: {same} of {len(stock)}; margins up to {stock.abs().max():.3g} differ by at most {apart:.1e}."
        f" Margins nearer to 0 than that, or 0, so that rounding may decide: {ties}."
    )


def beside_generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    words: Sequence[str],
    batches: Sequence[tuple[list[int], dict[str, Tensor], Tensor]],
    found: Tensor,
    way: str,
    exact: bool,
    results: Results,
) -> None:
    """A table of the prefill beside greedy `generate`, which must have the margins `found` [N] at its first token."""
    from tqdm import tqdm

    longest = 1 + max(len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words)
    generated(model, tokenizer, batches[0][1], longest)  # warms up
    seconds = [0.0, 0.0]
    again = torch.empty_like(found)
    texts: dict[int, str] = {}
    for numbers, inputs, first in tqdm(batches, desc="prefill and generate", unit="batch"):
        times = [shared.now(first.device)]
        margins(model, inputs, first)
        times.append(shared.now(first.device))
        whole, logits = generated(model, tokenizer, inputs, longest)
        times.append(shared.now(first.device))
        seconds = [total + end - begin for total, (begin, end) in zip(seconds, itertools.pairwise(times), strict=True)]
        again[numbers] = margin(logits, first)
        for number, string in zip(numbers, whole, strict=True):
            prompt = decoded(tokenizer, token_ids(tokenizer, questions[number].prompt))
            texts[number] = string[len(prompt) :]
    total, same = len(found), (again > 0) == (found > 0)
    wrong = int((~again.isfinite() | ~same & exact).sum())
    if wrong:
        results.fault(f"generate: {wrong} of {total} margins are not finite, or not those of the prefill.")
    valid = {number: word for number, string in texts.items() if (word := said(string, words))}
    agree = sum(word == words[found[number].item() <= 0] for number, word in valid.items())
    rows: list[dict[str, Any]] = [
        {"answers by": "one prefill", "seconds": seconds[0], "to the prefill": ""},
        {"answers by": f"generate, {longest} tokens", "seconds": seconds[1]},
    ]
    rows[1] |= {"to the prefill": f"{seconds[1] / seconds[0]:.2f}x", "larger logit alike": f"{same.sum()} of {total}"}
    rows[1] |= {"margins apart": f"{(again - found).abs().max():.1e}", "valid": f"{len(valid)} of {total}"}
    rows[1] |= {"same answer": f"{agree} of {len(valid)}"}
    note = (
        f"Both {way}, in turn, batch by batch. The logits of {' and '.join(words)} at the first new token are compared"
        " for every question. Valid: what is generated begins with one of the words, whole; same answer is of those."
    )
    if not valid:
        note += " No generated text is valid, so that only logits count."
    results.table("One prefill against generate", rows, note)
