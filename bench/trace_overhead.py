"""What a trace costs: forwards of MoE layers at Gemma-4-26B's width with and without one, in turn.

    python -m omnigene_fast.bench.trace_overhead [--layers 2] [--tokens 256] [--rounds 40] [--json FILE]

Two models share their weights; one has a trace open, with ids, weights and counts, on a run in a temporary directory.
Each traced forward is timed until the background thread has taken its records in, so that nothing is hidden in the
forward that follows; making them durable is timed by itself and shared out (by default it comes every 65,536 tokens,
so here, after fewer, it weighs more). The dense MLP, attention and vocabulary are as small as they can be: what is
timed is the block, router, norms and experts.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import omnigene_fast
from omnigene_fast import info

from .workloads import cheap_random

GOAL = {"cpu": 0.02, "cuda": 0.01}  # of the block


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2, help="1.5 GB each; default: 2")
    parser.add_argument("--tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--rounds", type=int, default=40, help="default: 40")
    parser.add_argument("--record", default="ids,weights", help="default: ids,weights")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = measure(options.layers, options.tokens, options.rounds, tuple(options.record.split(",")), device)
    for name, value in figures.items():
        print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(layers: int, tokens: int, rounds: int, record: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Milliseconds of forwards with and without a trace, and the shares that the trace takes of the block."""
    plain = block_model(layers, device)
    traced = copy.deepcopy(plain, {id(each): each for each in (*plain.parameters(), *plain.buffers())})
    ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[str, list[float]] = {"plain": [], "traced": [], "handed over": []}
    with tempfile.TemporaryDirectory() as path, torch.no_grad():
        tracer = omnigene_fast.trace(traced, Path(path) / "run", record=record)
        with tracer:
            for turn in tqdm(range(rounds + 2), desc="overhead"):
                if turn == 2:
                    tracer.flush()  # the first commit imports what it needs
                for name in ("plain", "traced") if turn % 2 else ("traced", "plain"):
                    model = plain if name == "plain" else traced
                    _synchronize(device)
                    begin = time.perf_counter()
                    model(ids, use_cache=False)
                    _synchronize(device)
                    handed_over = time.perf_counter() - begin
                    if name == "traced":
                        tracer.settle()
                    elapsed = time.perf_counter() - begin
                    if turn >= 2:
                        times[name].append(elapsed * 1e3)
                        if name == "traced":
                            times["handed over"].append(handed_over * 1e3)
            begin = time.perf_counter()
            tracer.flush()
            commit = (time.perf_counter() - begin) * 1e3 / rounds
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = np.array(times["traced"]) - np.array(times["plain"])
    rng = np.random.default_rng(0)
    resampled = np.median(rng.choice(pairs, (2000, len(pairs))), axis=1)
    extra = float(np.median(pairs)) + commit
    return {
        "layers": layers,
        "tokens": tokens,
        "record": ",".join(("counts", *record)),
        "plain_ms": medians["plain"],
        "traced_ms": medians["traced"],
        "handed_over_ms": medians["handed over"],
        "commit_ms_per_forward": commit,
        "extra_ms": extra,
        "overhead": extra / medians["plain"],
        "overhead_low": float(np.quantile(resampled, 0.025) + commit) / medians["plain"],
        "overhead_high": float(np.quantile(resampled, 0.975) + commit) / medians["plain"],
        "goal": GOAL[device.type],
        "dropped": tracer.dropped,
        "rounds": rounds,
        **info.environment(device, torch.bfloat16),
    }


def block_model(layers: int, device: torch.device) -> Any:
    """An accelerated Gemma-4 whose MoE blocks have the true width and whose other parts are tiny."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=2816,
        hidden_size_per_layer_input=0,
        intermediate_size=16,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        enable_moe_block=True,
        num_hidden_layers=layers,
        layer_types=["full_attention"] * layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
    )
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    rng = np.random.Generator(np.random.SFC64(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            for part in parameter if parameter.dim() == 3 else (parameter,):
                part.copy_(cheap_random(rng, part.numel()).view(part.shape))
            if name.endswith("router.proj.weight"):
                parameter.mul_(64)
    for module in model.modules():  # what the constructor computed on the meta device
        if hasattr(module, "compute_default_rope_parameters") or "rotary_emb" in type(module).__name__.lower():
            module.__init__(config)
    return omnigene_fast.accelerate(model.to(device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
