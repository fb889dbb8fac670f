"""Expert parallelism by transformers' own plan: each process holds a share of the experts, the results are the same.

    torchrun --nproc_per_node 2 examples/omnigene/expert_parallel.py --compare
    torchrun --nproc_per_node 8 examples/omnigene/expert_parallel.py --model CKPT --exchange all_to_all

`DistributedConfig(tp_size=..., ep_size=...)` makes `from_pretrained` read a share of the experts, and of attention and
dense MLP by transformers' tensor-parallel plan; routers are on every process. With `--exchange all_reduce` each process
runs its experts on the whole batch and the outputs are summed up; with all_to_all the tokens travel to the process of
their experts and back. The accelerator comes after, by the same line as ever. The measure is what one process computes
with the plain checkpoint: logits, loss, and the gradients of the routers and of each process' own experts.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import shared
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from omnigene_fast.bench.memory import peak_bytes
from omnigene_fast.demo.model import load_texts
from omnigene_fast.demo.training import join, wait

ROUTERS = "router."
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass
class Outcome:
    """What a forward and a backward give: logits [B, S, V], loss, gradients of routers and experts; tokens/s, peak."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    speed: float
    peak: int | None  # bytes beyond the model, in the first process


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Compare with one process, report; the relative differences of each way by what they are of."""
    parser = shared.parser(__doc__, "expert_parallel", batch=4)
    parser.add_argument("--exchange", choices=("all_reduce", "all_to_all", "auto"), default="all_reduce")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed (default: %(default)s)")
    options = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise RuntimeError(
            "expected several processes, got one; start them with: torchrun --nproc_per_node 2"
            " examples/omnigene/expert_parallel.py"
        )
    rank, world = join()
    shared.start(options)
    path = shared.checkpoint(options)
    batch = None
    alone: dict[str, Outcome] = {}
    if rank == 0:
        model, tokenizer = shared.load(options, path)
        batch = inputs(tokenizer, options)
        whole = expert_bytes(model)
        measured = dict.fromkeys((shared.STOCK, *shared.ways(options)))  # stock is the measure
        alone = {way: step(shared.switch(model, way), batch, options.rounds) for way in measured}
        del model
    wait()  # the first process had the cores for itself
    batch = shared_inputs(batch)
    model = sharded(options, path, world)
    many = {way: step(shared.switch(model, way), batch, options.rounds) for way in shared.ways(options)}
    if rank:
        return {}
    apart = {way: differences(one, alone[shared.STOCK], world) for way, one in many.items()}
    results = shared.Results(options, "Expert parallelism", f"{world} processes, exchange {options.exchange}")
    rows = [
        {"of": what, **{way: f"{each[what]:.1e}" for way, each in apart.items()}} for what in next(iter(apart.values()))
    ]
    results.table("Relative difference to one process, stock", rows)
    experts = model.config.get_text_config().num_experts
    sizes = [("one", experts, whole, alone), (f"each of {world}", experts // world, expert_bytes(model), many)]
    rows = [
        {"process": name, "experts": count, "MB of expert weights": size / 1e6}
        | {f"tokens/s {way}": made[way].speed for way in many}
        for name, count, size, made in sizes
    ]
    results.table(
        "Forward and backward", rows, f"{batch['attention_mask'].sum()} tokens in a batch, the same for all processes"
    )
    results.table(f"Speed and memory of {world} processes", shared.side_by_side(many))
    results.save()
    return apart


def inputs(tokenizer: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    """One batch of texts of several families, padded on the left."""
    rows = [text for each in load_texts(1).values() for text in each][: options.batch]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [(begin + tokenizer(row, add_special_tokens=False)["input_ids"])[: options.length] for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = shared.padded(ids, tokenizer.pad_token_id, device)
    return made | {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


def shared_inputs(batch: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The first process' batch on every process."""
    box = [None if batch is None else {name: tensor.cpu() for name, tensor in batch.items()}]
    dist.broadcast_object_list(box)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return {name: tensor.to(device) for name, tensor in box[0].items()}


def sharded(options: argparse.Namespace, path: Any, world: int) -> Any:
    """The model with this process' share of the experts, of attention and of the dense MLP."""
    from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig

    experts = AutoConfig.from_pretrained(path).get_text_config().num_experts
    if experts % world:
        raise ValueError(f"--nproc_per_node: expected a divisor of the {experts} experts, got {world}.")
    plan = DistributedConfig(tp_size=world, ep_size=world, ep_implementation=options.exchange)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=plan).eval()


def step(model: Any, batch: dict[str, Tensor], rounds: int) -> Outcome:
    """Forward and backward once for what they give, then `rounds` times for the time."""

    def once() -> Any:
        model.zero_grad()
        out = model(**batch, use_cache=False)
        out.loss.backward()
        return out

    out = once()
    gradients = {
        name: whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if ROUTERS in name or name.endswith(EXPERTS)
    }
    peak = peak_bytes(once, out.loss.device)
    begin = time.perf_counter()
    for _ in range(rounds):
        once()
    seconds = time.perf_counter() - begin
    tokens = int(batch["attention_mask"].sum())
    real = batch["attention_mask"].bool()
    return Outcome(
        whole(out.logits.detach())[real], whole(out.loss.detach()), gradients, rounds * tokens / seconds, peak
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every process holds a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def expert_bytes(model: Any) -> int:
    """Bytes of the expert weights that this process holds."""
    held = [
        p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters() if name.endswith(EXPERTS)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def differences(ours: Outcome, truth: Outcome, world: int) -> dict[str, float]:
    """Relative differences of logits, loss and gradients, the experts' by the process that has them."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {
        "logits": [(ours.logits, truth.logits)],
        "loss": [(ours.loss, truth.loss)],
        "gradients of the routers": [(ours.gradients[n], g) for n, g in truth.gradients.items() if ROUTERS in n],
    }
    for rank in range(world):
        pairs[f"gradients of the experts of process {rank}"] = [
            (ours.gradients[name].chunk(world)[rank], gradient.chunk(world)[rank])
            for name, gradient in truth.gradients.items()
            if name.endswith(EXPERTS)
        ]
    return {
        what: max(((a.cpu() - b.cpu()).norm() / b.cpu().norm()).item() for a, b in each) for what, each in pairs.items()
    }


if __name__ == "__main__":
    shared.script("expert_parallel", main)
