"""Step "model": four layers of Gemma-4 at the width of the 26B-A4B, stock and accelerated: tokens/s and peak memory.

Everything has its true width but the vocabulary (4,096 instead of 262,144): with four layers of thirty, the true one
would be most of the work. Three layers have sliding attention and the last full attention.

    model_prefill  one sequence of T tokens, forward
    model_decode   T sequences, one token each per forward, behind a prompt of 128
    model_frozen   forward and backward of one sequence of T tokens; what is trained are the norms, so that the gradient
                   passes every layer and the experts are frozen
    model_lora16   the same; what is trained is LoRA of rank 16 on the experts (PEFT)

A result is right if it is as near to transformers' eager path as its grouped_mm path is, twice over: both round.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import omnigene_fast

from .. import runner
from ..floors import Probe, synchronize
from ..memory import peak_bytes
from ..providers import BATCHED_MM_MAX_TOKENS, OURS, installed
from ..timing import wall_clock
from ..training import FALLBACK, _fallback
from ..workloads import Shape
from . import cases, status, table

OPS = ("model_prefill", "model_decode", "model_frozen", "model_lora16")
STOCK = {"eager": "eager", "grouped_mm": "grouped_mm", FALLBACK: "grouped_mm", "batched_mm": "batched_mm"}
VOCABULARY, LAYERS, PROMPT, STEPS = 4096, 4, 128, 16
RANK = 16
WANTED = (
    *(("model_prefill", "random", 4096), ("model_decode", "random", 1), ("model_frozen", "random", 4096)),
    *(("model_lora16", "random", 4096), ("model_decode", "random", 8)),
)


@dataclass
class Subject:
    """The model, and the one that PEFT has adapted once it was asked for."""

    plain: Any
    device: torch.device
    tiny: bool
    adapted: Any = None

    @property
    def vocabulary(self) -> int:
        return self.plain.config.vocab_size


def run(context: status.Context) -> str | None:
    """Measure every case that has no rows yet."""
    subjects: list[Subject] = []
    probe = cases.probe_of(context.device, context.tiny)
    probe.sample()

    def measure(case: cases.Case) -> list[runner.Row]:
        if not subjects:
            subjects.append(build(context.device, context.tiny))
        op, mode, tokens = case[0], case[1], cases.tokens_of(case[2], context.tiny)
        return rows_of(subjects[0], op, mode, tokens, probe)

    return table.each(context, "model", WANTED, measure)


def build(device: torch.device, tiny: bool) -> Subject:
    """Random weights, as transformers draws them. On a GPU in bfloat16."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    shape = cases.shape_of(tiny)
    config = Gemma4TextConfig(
        vocab_size=64 if tiny else VOCABULARY,
        vocab_size_per_layer_input=64 if tiny else VOCABULARY,
        hidden_size=shape.H,
        hidden_size_per_layer_input=0,
        intermediate_size=3 * shape.I,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        top_k_experts=shape.K,
        enable_moe_block=True,
        num_hidden_layers=LAYERS,
        layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        sliding_window=8 if tiny else 1024,
        num_attention_heads=2 if tiny else 16,
        num_key_value_heads=1 if tiny else 8,
        num_global_key_value_heads=1 if tiny else 2,
        attention_k_eq_v=True,
        head_dim=16 if tiny else 256,
        global_head_dim=32 if tiny else 512,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with device:
            model = Gemma4ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.endswith("router.proj.weight"):
            parameter.data.mul_(5)  # tokens with preferences: a tie that rounding breaks is no difference of kernels
    return Subject(model.to(device).eval().requires_grad_(False), device, tiny)


def rows_of(subject: Subject, op: str, mode: str, tokens: int, probe: Probe) -> list[runner.Row]:
    """One row per implementation of the experts."""
    if op == "model_lora16" and not installed("peft"):
        return [_row(subject, op, mode, tokens, OURS, ("missing", "peft is not installed"), probe)]
    names = [OURS, *(name for name in STOCK if _runs(op, name, tokens))]
    jobs = {name: _job(subject, op, tokens, name) for name in names}
    results: dict[str, Tensor] = {}
    state: dict[str, tuple[str, str]] = {}
    peaks: dict[str, int | None] = {}
    for name in reversed(names):  # ours last: what it is measured against is known by then
        try:
            results[name] = jobs[name]()
            state[name] = ("ok", "")
            given = jobs[name].before()
            peaks[name] = peak_bytes(functools.partial(jobs[name].call, given), subject.device)
        except Exception as crash:  # an implementation's own way to fail
            state[name] = ("failed", status.sentence(crash))
    distance = {name: _distance(result, results.get("eager")) for name, result in results.items()}
    off, theirs = distance.get(OURS), distance.get("grouped_mm") or 0.0
    if off is not None:
        right = off <= 2 * theirs + (1e-5 if subject.tiny else 1e-2)
        state[OURS] = ("ok" if right else "wrong", f"{off:.1e} from eager, grouped_mm {theirs:.1e}")
    times = _timed({name: jobs[name] for name in names if state[name][0] == "ok"}, subject)
    rows = []
    for name in names:
        row = _row(subject, op, mode, tokens, name, state[name], probe)
        if name in times:
            row |= {
                f"p{percent}_ms": runner.digits(runner.percentile(times[name], percent)) for percent in (20, 50, 80)
            }
            row["rounds"] = len(times[name])
            row["tokens_per_s"] = runner.digits(jobs[name].tokens / statistics.median(times[name]) * 1e3)
            row["error"] = None if distance.get(name) is None else runner.digits(distance[name] or 0.0)
            row["peak_mb"] = None if peaks.get(name) is None else runner.digits((peaks[name] or 0) / 1e6)
        rows.append(row)
    return runner.against_the_best_peer(rows)


def _runs(op: str, name: str, tokens: int) -> bool:
    """Whether an implementation is run: batched_mm copies the weights of every token's experts."""
    return name != "batched_mm" or (op == "model_decode" and tokens <= BATCHED_MM_MAX_TOKENS)


@dataclass
class Job:
    """`before` is not timed; what it returns goes to `call`, which returns logits or gradients of `tokens` tokens."""

    before: Callable[[], Any]
    call: Callable[[Any], Tensor]
    tokens: int

    def __call__(self) -> Tensor:
        return self.call(self.before())


def _job(subject: Subject, op: str, tokens: int, name: str) -> Job:
    """What implementation `name` does in `op`."""
    model = subject.plain if op != "model_lora16" else _with_lora(subject)
    train, decoding = op in ("model_frozen", "model_lora16"), op == "model_decode"
    prompt, steps = (4, 2) if subject.tiny else (PROMPT, STEPS)
    generator = torch.Generator().manual_seed(1)
    size = (tokens, prompt) if decoding else (1, tokens)
    ids = torch.randint(3, subject.vocabulary, size, generator=generator).to(subject.device)

    def before() -> Any:
        _switch(model, name)
        for parameter_name, parameter in model.named_parameters():
            wanted = "lora_" in parameter_name if op == "model_lora16" else parameter.dim() == 1
            parameter.requires_grad_(train and wanted)
        if not decoding:
            return None
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def call(cache: Any) -> Tensor:
        with _fallback() if name == FALLBACK else contextlib.nullcontext(), torch.set_grad_enabled(train):
            if train:
                trained = [each for each in model.parameters() if each.requires_grad]
                logits = model(input_ids=ids, use_cache=False).logits
                loss = logits.float().logsumexp(-1).mean() - logits[..., 0].float().mean()
                return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)])
            if not decoding:
                return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            for turn in range(steps):
                out = model(input_ids=ids[:, turn : turn + 1], past_key_values=cache, use_cache=True)
            return out.logits

    return Job(before, call, tokens * steps if decoding else tokens)


def _switch(model: Any, name: str) -> None:
    omnigene_fast.restore(model)
    if name == OURS:
        omnigene_fast.accelerate(model)
    else:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.set_experts_implementation(STOCK[name])


def _with_lora(subject: Subject) -> Any:
    if subject.adapted is None:
        from peft import LoraConfig, get_peft_model

        omnigene_fast.restore(subject.plain)
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            target_modules=[],
        )
        subject.adapted = get_peft_model(subject.plain, lora)
        generator = torch.Generator(subject.device).manual_seed(2)
        for name, parameter in subject.adapted.named_parameters():
            if "lora_B" in name:  # zero at first: lora_A would have no gradient
                parameter.data.normal_(0, 1e-3, generator=generator)
    return subject.adapted


def _distance(result: Tensor, eager: Tensor | None) -> float | None:
    if eager is None:
        return None
    off = (result.double() - eager.double()).norm() / eager.double().norm()
    return float(off) if torch.isfinite(off) else float("inf")


def _timed(jobs: dict[str, Job], subject: Subject) -> dict[str, list[float]]:
    """Milliseconds of interleaved calls by the clock: a model's launches are part of what its user waits for."""
    times: dict[str, list[float]] = {name: [] for name in jobs}

    def waited(job: Job, given: Any) -> Tensor:
        result = job.call(given)
        synchronize(subject.device)
        return result

    for _ in range(2 if subject.tiny else 5):
        for name, job in jobs.items():
            given = job.before()
            synchronize(subject.device)
            times[name].append(wall_clock(name, functools.partial(waited, job, given)).ms)
    return times


def _row(
    subject: Subject, op: str, mode: str, tokens: int, name: str, state: tuple[str, str], probe: Probe
) -> runner.Row:
    shape: Shape = cases.shape_of(subject.tiny)
    dtype = next(subject.plain.parameters()).dtype
    row = {"op": op, "mode": mode, "tokens": tokens} | runner.setting(shape, dtype)
    row |= {
        "floor_ms": None,
        "bound": None,
        "bandwidth_gb_s": runner.digits(probe.bandwidth),
        "peak_gflop_s": runner.digits(probe.peak),
        "probe": probe.kind,
        "eager_error": None,
        "layers": LAYERS,
        "peak_mb": None,
        "tokens_per_s": None,
    }
    return row | runner.timed_row(name, state, None, None, 1.0)
