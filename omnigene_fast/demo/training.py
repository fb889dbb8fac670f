"""Training with transformers' Trainer, measured: losses as they were computed, tokens/s, peak memory.

Shared by `omnigene-fast demo` and examples/train_lora.py. Under torchrun Trainer trains with all processes, by DDP or,
if the plan says so, FSDP2.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from omnigene_fast.bench.floors import synchronize
from omnigene_fast.bench.memory import peak_bytes

IGNORED = -100  # the label of a token that is not learned
WARM_UP = 5  # steps of a rising learning rate
PATIENCE = timedelta(hours=2)  # while one process loads, merges or writes a checkpoint, the others wait for it

Sample = dict[str, list[int]]  # input_ids, labels and any further labels, equally long
Collator = Callable[[Sequence[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How to train: `steps` optimizer steps, or fewer (but two) once `seconds` have passed, of `accumulate` batches.

    `batch` is that of one process; `seconds` are for one process alone. `fsdp`: FSDP2 in place of DDP.
    """

    steps: int
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    seconds: float | None = None
    checkpointing: bool = True
    bf16: bool = True
    liger: bool = False
    optimizer: str = "adamw_torch"
    seed: int = 0
    fsdp: bool = False


@dataclass
class Run:
    """What came of it."""

    losses: list[float] = field(default_factory=list)  # one per optimizer step, before it
    tokens: int = 0  # that were timed, padding left out
    seconds: float = 0.0  # without the first step, which warms up
    peak: int | None = None  # bytes beyond the model's own
    logs: list[dict[str, float]] = field(default_factory=list)  # of Trainer, where a callback asked for one

    @property
    def speed(self) -> float:
        """Tokens per second; NaN if only the first step ran."""
        return self.tokens / self.seconds if self.seconds else float("nan")


def join() -> tuple[int, int]:
    """(rank, number of processes) of this process, (0, 1) without torchrun; with it, joins the others' group."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return int(os.environ.get("RANK", 0)), world


def wait() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def chunks(ids: list[int], length: int) -> list[Sample]:
    """A document as samples of at most `length` tokens, every one of them learned."""
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [{"input_ids": part, "labels": part} for part in parts if len(part) > 1]


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Samples as one batch, padded on the right; whatever they have besides input_ids are labels."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

    mask = torch.tensor([[1] * len(each["input_ids"]) + [0] * (longest - len(each["input_ids"])) for each in samples])
    labels = {key: padded(key, IGNORED) for key in samples[0] if key != "input_ids"}
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, **labels}


def train(
    model: Any,
    samples: Sequence[Any],
    plan: Plan,
    *,
    pad: int,
    title: str,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Collator | None = None,
) -> Run:
    """Train what requires a gradient in `model`, in place, and measure.

    The order of the samples depends on `plan.seed` alone. `title` labels the progress bar; `callbacks` are Trainer's.
    `collator` makes a batch, with an attention_mask, of samples that are not `Sample`s, such as those with images.

    Raises:
        ValueError: `plan.fsdp` for a model whose layers transformers does not name.
        RuntimeError: `plan.fsdp`, and the parameters were not sharded, as with one process.
    """
    device = next(model.parameters()).device
    rank, world = join()
    run = Run()
    bar = tqdm(total=plan.steps, desc=title, unit="step", disable=rank > 0)
    with tempfile.TemporaryDirectory() as nowhere, warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore", FutureWarning)  # checkpointing's arguments get other names in transformers 6
        arguments = TrainingArguments(
            nowhere,
            max_steps=plan.steps,
            per_device_train_batch_size=plan.batch,
            gradient_accumulation_steps=plan.accumulate,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARM_UP,
            optim=plan.optimizer,
            bf16=plan.bf16,
            gradient_checkpointing=plan.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=plan.liger,
            liger_kernel_config={"fused_linear_cross_entropy": True, "rms_norm": False, "geglu": False},
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            seed=plan.seed,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            ddp_backend=dist.get_backend() if world > 1 else None,
            ddp_find_unused_parameters=False,  # nothing is unused, and the search would not bear checkpointing
            fsdp=plan.fsdp,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": _blocks(model)} if plan.fsdp else None,
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=list(samples),
            data_collator=collator or (lambda rows: collate(rows, pad)),
            callbacks=[_Watch(run, plan, device, bar), *callbacks],
        )
        trainer.measured = run
        trainer.remove_callback(PrinterCallback)  # we print
        run.peak = peak_bytes(trainer.train, device)
        run.logs = trainer.state.log_history
    if world > 1:
        run.tokens = int(_over_processes(run.tokens, dist.ReduceOp.SUM, device))
        run.seconds = _over_processes(run.seconds, dist.ReduceOp.MAX, device)
        run.peak = int(_over_processes(run.peak or 0, dist.ReduceOp.MAX, device)) or None
    return run


def _blocks(model: Any) -> list[str]:
    """The classes of the layers that FSDP2 gathers one by one; transformers' own list names some of other models."""
    named = model._no_split_modules or ()
    found = sorted({type(module).__name__ for module in model.modules()} & set(named))
    if not found:
        raise ValueError(
            f"model: expected layers of a class that its _no_split_modules names, for FSDP2 to gather one by one, got "
            f"{type(model).__name__} with {', '.join(sorted(named)) or 'none'}; train it without fsdp."
        )
    return found


def _over_processes(value: float, how: Any, device: torch.device) -> float:
    """`value` summed up, or its maximum, over all processes."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, how)
    return total.item()


class _Trainer(Trainer):
    measured: Run

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on a CPU too: accelerate asks for an accelerator, and would quietly train by DDP."""
        from accelerate import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        on_cpu = self.args.use_cpu and state.distributed_type == DistributedType.MULTI_CPU
        if self.args.fsdp and on_cpu:
            state.distributed_type = DistributedType.FSDP
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.accelerator.mixed_precision != "no":  # as accelerate does, which makes what is trained float32
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Keep the loss: Trainer's own log has the running mean, and the comparison wants every digit."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # With accumulation each batch's loss is its share of the step's, because Gemma-4 divides by the step's tokens.
        self.measured.losses[-1] += (loss[0] if isinstance(loss, tuple) else loss).item()
        self.measured.tokens += int(inputs["attention_mask"].sum())
        return loss


class _Watch(TrainerCallback):
    def __init__(self, run: Run, plan: Plan, device: torch.device, bar: Any) -> None:
        self.run, self.plan, self.device, self.bar = run, plan, device, bar
        self.begin = time.perf_counter()
        self.timed = self.begin

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if self.plan.fsdp and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise RuntimeError(
                f"fsdp: expected parameters that FSDP2 has sharded over several processes, got {args.world_size} of"
                " them with whole ones; start several by torchrun, or train without fsdp."
            )

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.run.losses.append(0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.world_size > 1:  # each has the loss of its own samples, divided by its share of the tokens of all
            total = _over_processes(self.run.losses[-1], dist.ReduceOp.SUM, self.device)
            self.run.losses[-1] = total / args.world_size
        synchronize(self.device)
        now = time.perf_counter()
        if len(self.run.losses) == 1:
            self.run.tokens, self.timed = 0, now
        self.run.seconds = now - self.timed
        self.bar.update()
        self.bar.set_postfix(loss=f"{self.run.losses[-1]:.4f}")
        late = self.plan.seconds is not None and now - self.begin > self.plan.seconds
        if late and len(self.run.losses) > 1:  # one step alone has no speed
            control.should_training_stop = True
        return control
