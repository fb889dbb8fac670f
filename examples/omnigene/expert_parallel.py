"""Expert parallelism by transformers' own plan: each process holds a share of the experts, the results are the same.

    torchrun --nproc_per_node 2 examples/omnigene/expert_parallel.py --compare
    torchrun --nproc_per_node 8 examples/omnigene/expert_parallel.py --model CKPT --exchange all_to_all

`DistributedConfig(tp_size=..., ep_size=...)` makes `from_pretrained` read a share of the experts, and of attention and
dense MLP by transformers' tensor-parallel plan; routers are on every process. With `--exchange all_reduce` each process
runs its experts on the whole batch and the outputs are summed up; with all_to_all the tokens travel to the process of
their experts and back. The accelerator comes after, by the same line as ever. Compared are logits, loss, and the
gradients of the routers and of each process' own experts; nothing else requires a gradient.

The measure is what one process computes with the stock model, all of which it must hold: so it is for the small model,
and for a checkpoint with `--reference`. Without that, `--compare` compares accelerated with stock, both in shares.
"""

import argparse
import math
import os
from collections.abc import Iterable, Sequence
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
ALLOWED = 1e-4  # relative difference in float32


@dataclass
class Outcome:
    """What a forward and a backward give: logits [B, S, V], loss, gradients of routers and experts; tokens/s, peak."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]  # on the CPU
    speed: float
    peak: int | None  # bytes beyond the model, in the first process


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Compare, report; the relative differences of each way by what they are of."""
    parser = shared.parser(__doc__, "expert_parallel", batch=4)
    parser.add_argument(
        "--exchange",
        choices=("all_reduce", "all_to_all", "auto"),
        default="all_reduce",
        help="how tokens reach their experts",
    )
    parser.add_argument("--reference", action="store_true", help="compare with one process, which holds all of --model")
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
    batch = inputs(shared.load_tokenizer(path), options)
    reference = options.reference or options.model is None
    ways = shared.ways(options)
    alone: dict[str, Outcome] = {}
    sizes: list[tuple[str, int, int, dict[str, Outcome]]] = []
    if reference and rank == 0:
        model, _ = shared.load(options, path)
        experts = model.config.get_text_config().num_experts
        measured = dict.fromkeys((shared.STOCK, *ways))  # stock is the measure
        alone = {way: step(shared.switch(model, way), batch, options.rounds) for way in measured}
        sizes.append(("one", experts, expert_bytes(model), alone))
        del model
    wait()  # the first process had the cores for itself
    model = sharded(options, path, world)
    many = {way: step(shared.switch(model, way), batch, options.rounds, gather=reference) for way in ways}
    if reference:
        apart = {way: differences(one, alone[shared.STOCK], world) for way, one in many.items()} if rank == 0 else {}
        measure = "one process, stock"
    else:
        apart = {way: differences_of_all(many[way], many[shared.STOCK]) for way in ways if options.compare}
        apart.pop(shared.STOCK, None)
        measure = f"stock, in {world} processes too"
    if rank:
        return {}
    results = shared.Results(options, "Expert parallelism", f"{world} processes, exchange {options.exchange}")
    if apart:
        rows = [
            {"of": what, **{way: f"{each[what]:.1e}" for way, each in apart.items()}}
            for what in next(iter(apart.values()))
        ]
        results.table(f"Relative difference to {measure}", rows)
    for way, each in apart.items():
        for what, difference in each.items():
            if many[way].logits.dtype == torch.float32 and not difference <= ALLOWED:
                results.fault(f"{way}: {what} differ by {difference:.1e} from {measure}, more than {ALLOWED:.0e}.")
    experts = model.config.get_text_config().num_experts
    sizes.append((f"each of {world}", experts // world, expert_bytes(model), many))
    rows = [
        {"process": name, "experts": count, "MB of expert weights": size / 1e6}
        | {f"tokens/s {way}": made[way].speed for way in many}
        for name, count, size, made in sizes
    ]
    note = f"{batch['attention_mask'].sum()} tokens in a batch, the same for all processes"
    if not apart:
        note += "; compared with nothing: ask for --compare, or --reference"
    results.table("Forward and backward", rows, note)
    results.table(f"Speed and memory of {world} processes", shared.side_by_side(many))
    results.save()
    return apart


def inputs(tokenizer: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    """One batch of texts of several families, padded on the left; the same in every process."""
    rows = [text for each in load_texts(1).values() for text in each][: options.batch]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [(begin + tokenizer(row, add_special_tokens=False)["input_ids"])[: options.length] for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = shared.padded(ids, tokenizer.pad_token_id, device)
    return made | {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}


def sharded(options: argparse.Namespace, path: Any, world: int) -> Any:
    """The model with this process' share of the experts, of attention and of the dense MLP."""
    from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig

    experts = AutoConfig.from_pretrained(path).get_text_config().num_experts
    if experts % world:
        raise ValueError(f"--nproc_per_node: expected a divisor of the {experts} experts, got {world}.")
    plan = DistributedConfig(tp_size=world, ep_size=world, ep_implementation=options.exchange)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=plan).eval()


def step(model: Any, batch: dict[str, Tensor], rounds: int, *, gather: bool = False) -> Outcome:
    """Forward and backward once for what they give, then `rounds` times for the time.

    The gradients are those of the parameters' shares in this process; with `gather` the first process gets them whole.
    """
    device = batch["input_ids"].device
    learned = {name: each for name, each in model.named_parameters() if ROUTERS in name or name.endswith(EXPERTS)}
    model.requires_grad_(False)  # gradients of all that a checkpoint has would not fit beside it
    for parameter in learned.values():
        parameter.requires_grad_(True)

    def once() -> Any:
        model.zero_grad()
        out = model(**batch, use_cache=False)
        out.loss.backward()
        return out

    out = once()
    gradients = {}
    for name, parameter in learned.items():
        gradient = whole(parameter.grad) if gather else share(parameter.grad)  # whole: every process takes part
        if not gather or dist.get_rank() == 0:
            gradients[name] = gradient.cpu().clone()
    real = batch["attention_mask"].bool()
    logits, loss = whole(out.logits.detach())[real].cpu(), whole(out.loss.detach()).cpu()
    del out
    peak = peak_bytes(once, device)
    begin = shared.now(device)
    for _ in range(rounds):
        once()
    seconds = shared.now(device) - begin
    model.zero_grad()
    return Outcome(logits, loss, gradients, rounds * int(real.sum()) / seconds, peak)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every process holds a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def expert_bytes(model: Any) -> int:
    """Bytes of the expert weights that this process holds."""
    held = [share(parameter) for name, parameter in model.named_parameters() if name.endswith(EXPERTS)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def differences(ours: Outcome, truth: Outcome, world: int) -> dict[str, float]:
    """Relative differences of logits, loss and whole gradients, the experts' by the process that has them."""
    made = relative(ours, truth)
    for rank in range(world):
        made[f"gradients of the experts of process {rank}"] = largest(
            (ours.gradients[name].chunk(world)[rank], gradient.chunk(world)[rank])
            for name, gradient in truth.gradients.items()
            if name.endswith(EXPERTS)
        )
    return made


def differences_of_all(ours: Outcome, truth: Outcome) -> dict[str, float]:
    """The same where each process has its share of the gradients; of what all have, the largest."""
    experts = ((ours.gradients[name], each) for name, each in truth.gradients.items() if name.endswith(EXPERTS))
    mine = relative(ours, truth) | {f"gradients of the experts of process {dist.get_rank()}": largest(experts)}
    of_all: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    names = dict.fromkeys(name for each in of_all for name in each)
    return {name: max(each[name] for each in of_all if name in each) for name in names}


def relative(ours: Outcome, truth: Outcome) -> dict[str, float]:
    """Relative differences of what every process has: logits, loss, gradients of the routers."""
    routers = ((ours.gradients[name], each) for name, each in truth.gradients.items() if ROUTERS in name)
    return {
        "logits": largest([(ours.logits, truth.logits)]),
        "loss": largest([(ours.loss, truth.loss)]),
        "gradients of the routers": largest(routers),
    }


def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference of pairs of tensors; infinite where one is not a number."""
    made = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    return max(math.inf if math.isnan(each) else each for each in made)


if __name__ == "__main__":
    shared.script("expert_parallel", main)
