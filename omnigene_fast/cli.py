"""The `omnigene-fast` command: thin verbs over the package; every error is one sentence and a non-zero exit."""

import datetime
from pathlib import Path

import click

from . import cli_kernels, cli_trace, cli_tune
from .cli_options import DTYPES, dtype_of, numbers, parse_device, sentence, set_threads, words


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="omnigene-fast")
def main() -> None:
    """Fast, exact mixture-of-experts for Gemma-4, as a drop-in for transformers.

    \b
    Example:
      omnigene-fast demo
    """


@main.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@sentence
def info(run: Path | None) -> None:
    """Device, backends, versions, and what each missing piece would need; or what RUN, a trace, holds.

    \b
    Example:
      omnigene-fast info
      omnigene-fast info runs/base
    """
    from . import info as information

    click.echo(information.report() if run is None else information.trace_report(run))


@main.command()
@click.option("--model", "path", type=click.Path(), help="A checkpoint directory instead of the small random model.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice by default.")
@click.option("--true-shape/--no-true-shape", default=True, help="Also time one layer at Gemma-4-26B's size (1.5 GB).")
@click.option("--train/--no-train", default=True, help="Also train the small model for less than a minute.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New directory for the router traces and report.html.  [default: ./omnigene-fast-demo-DATE-TIME]",
)
@sentence
def demo(path: str | None, device: str, threads: int | None, true_shape: bool, train: bool, out: Path | None) -> None:
    """A Gemma-4 MoE on real sequences, stock and accelerated: is it right, and how much faster is it?

    Without --model, the model is a small Gemma-4 with random weights and byte tokens. It is trained too, and a report
    says how its routing changed.

    \b
    Example:
      omnigene-fast demo
      omnigene-fast demo --model ./gemma-4-26B-A4B --device cuda --no-true-shape
    """
    from .demo import run

    chosen = parse_device(device)
    set_threads(threads)
    out = out or Path(f"omnigene-fast-demo-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    run(chosen, Path(path) if path else None, true_shape=true_shape, train=train, out=out)


@main.command()
@click.option("--quick", is_flag=True, help="Three token counts, two routing modes, few rounds: under two minutes.")
@click.option(
    "--op",
    "ops",
    help="Comma-separated: route, experts, block, experts_frozen, experts_full, experts_lora16, experts_lora64; or"
    " forward (the first three), training (the others).  [default: all]",
)
@click.option("--tokens", help="Comma-separated token counts.  [default: 1,4,16,64,256,1024; training 16,256,1024]")
@click.option("--modes", help="Comma-separated: uniform, natural, protein.  [default: all; training uniform,protein]")
@click.option("--providers", help="Comma-separated names.  [default: all that run here]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--shape", help="H,I,E,K of the layer.  [default: 2816,704,128,8, one layer of Gemma-4-26B-A4B]")
@click.option("--seconds", type=click.FloatRange(min=0), help="Per case.  [default: 6, with --quick 1]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice by default.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--backend", default="auto", show_default=True, help="auto, cpu, triton or reference: which of ours.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="JSON rows; the plot goes beside it.  [default: ./DEVICE.json]"
)
@click.option("--merge", is_flag=True, help="Keep the other cases of the file at --out.")
@sentence
def bench(
    quick: bool,
    ops: str | None,
    tokens: str | None,
    modes: str | None,
    providers: str | None,
    dtype: str,
    shape: str | None,
    seconds: float | None,
    threads: int | None,
    device: str,
    backend: str,
    out: Path | None,
    merge: bool,
) -> None:
    """Time router, experts, block and the experts' backward against transformers, PEFT and the physical floor.

    Every provider is first checked against float64; a wrong one is shown as wrong, not as fast.

    \b
    Example:
      omnigene-fast bench --quick
      omnigene-fast bench --op experts --tokens 1,16 --modes uniform --out rows.json
      omnigene-fast bench --op training --out rows.json --merge
    """
    from tqdm import tqdm

    from . import info as information
    from .bench import plot, report, runner
    from .bench.workloads import Shape

    torch_device = parse_device(device)
    set_threads(threads)
    groups = {"forward": runner.FORWARD_OPS, "training": runner.TRAINING_OPS}
    settings = runner.Settings(
        ops=tuple(op for word in words(ops, runner.OPS) for op in groups.get(word, (word,))),
        tokens=numbers("tokens", tokens, (1, 16, 256) if quick else runner.TOKENS),
        modes=words(modes, ("uniform", "protein") if quick else runner.MODES),
        training_tokens=numbers("tokens", tokens, (16,) if quick else runner.TRAINING_TOKENS),
        training_modes=words(modes, ("uniform",) if quick else runner.TRAINING_MODES),
        providers=words(providers, runner.NAMES),
        dtype=dtype_of(dtype),
        device=torch_device,
        shape=Shape(*numbers("shape", shape, (2816, 704, 128, 8), count=4)),
        backend=backend,
        seconds=seconds if seconds is not None else 1.0 if quick else 6.0,
        min_rounds=4 if quick else 7,
    )
    out = out or Path()
    if out.is_dir():
        out /= f"{information.slug(torch_device)}.json"
    if not out.parent.is_dir():
        raise ValueError(f"--out: expected a file in an existing directory, got {out}.")
    before = report.load(out) if merge and out.exists() else []
    environment, remark = information.environment(torch_device, settings.dtype, backend), information.busy()
    report.check_mergeable(before, environment | runner.setting(settings.shape, settings.dtype))
    with tqdm(total=len(settings.cases()), unit="case") as bar:

        def progress(case: str) -> None:
            bar.set_description(case)
            bar.update()

        rows = runner.run(settings, environment, progress)
    kept = report.merged(before, rows)
    report.save(kept, out)
    click.echo(report.console(rows))
    lost = report.losses(rows)
    if remark:
        click.echo(f"{remark}\n")
    click.echo("where we lose\n" + "\n".join(f"  {line}" for line in lost or ["nowhere in these rows"]))
    try:
        plots = plot.plot(kept, out.with_suffix(".png"))
        click.echo(f"\nrows: {out}\nplot: {', '.join(map(str, plots))}")
    except ImportError:
        click.echo(f"\nrows: {out}\nplot: none, matplotlib is not installed (pip install 'omnigene-fast[bench]')")


for _command in (*cli_trace.COMMANDS, cli_kernels.kernels, *cli_tune.COMMANDS):
    main.add_command(_command)

if __name__ == "__main__":
    main()
