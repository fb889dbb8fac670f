"""The verb `tune`: measure the tiles of the expert GEMMs on this machine's GPU and keep the best."""

import importlib.util
import shlex
import sys
from pathlib import Path

import click

from .cli_options import dtype_of, numbers, parse_device, sentence


@click.command()
@click.option("--tokens", help="Comma-separated token counts, a bucket each.  [default: 64,256,512,1024,4096,16384]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--weights", type=click.Choice(["same", "int8", "fp8"]), default="same", show_default=True)
@click.option("--lora", "rank", type=click.IntRange(min=1), help="With low-rank updates of this rank.")
@click.option("--training/--no-training", default=True, help="Also the kernels of the backward.")
@click.option("--shape", help="H,I,E,K of the layer.  [default: 2816,704,128,8, one layer of Gemma-4-26B-A4B]")
@click.option("--device", default="auto", show_default=True, help="auto or cuda[:N].")
@click.option("--budget", type=click.FloatRange(min=0), default=600, show_default=True, help="Seconds.")
@click.option("--out", type=click.Path(path_type=Path), help="The table.  [default: where this user's are looked for]")
@sentence
def tune(
    tokens: str | None,
    dtype: str,
    weights: str,
    rank: int | None,
    training: bool,
    shape: str | None,
    device: str,
    budget: float,
    out: Path | None,
) -> None:
    """Measure tiles of the expert GEMMs on this GPU and write the best as a table, which is used from then on.

    Every candidate's numbers are compared with those of the present tiles first. What the budget did not suffice for is
    measured when the same command is run again; a table that is there already is replaced only by a faster one.

    \b
    Example:
      omnigene-fast tune
      omnigene-fast tune --weights int8 --tokens 512,4096 --budget 300
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "tune: expected the package triton, which is not installed; install it with"
            " `pip install 'omnigene-fast[triton]'`."
        )
    import torch
    from tqdm import tqdm

    from . import info
    from . import tune as tuning

    chosen = parse_device(device)
    if chosen.type != "cuda":
        raise RuntimeError(
            "tune: expected an NVIDIA GPU to measure on, and "
            + ("torch finds none here" if not torch.cuda.is_available() else f"--device is {device}")
            + "; run it on the machine that runs the model."
        )
    from . import tune_kernels
    from .kernels import tables

    torch.cuda.set_device(chosen)
    properties = tune_kernels.this_device(chosen)
    settings = tuning.Settings(
        properties,
        numbers("shape", shape, (2816, 704, 128, 8), count=4),  # type: ignore[arg-type]
        dtype_of(dtype),
        weights,
        rank or 0,
        numbers("tokens", tokens, tuning.TOKENS),
        training,
    )
    path = out or tables.user_file(properties.name)
    if path is None:
        raise ValueError(f"--out: expected a file, because {tables.VARIABLE} is empty, which means no tables.")
    layer = tune_kernels.Layer(settings, chosen)
    with tqdm(unit="kernel") as bar:

        def progress(done: str, total: int) -> None:
            bar.total = total
            bar.set_description(done)
            bar.update()

        said = tuning.run(
            settings,
            layer.at,
            tune_kernels.CudaTimer(chosen),
            path,
            seconds=budget,
            command=shlex.join(["omnigene-fast", *sys.argv[1:]]),
            versions={name: info.package_version(name) for name in ("omnigene-fast", "torch", "triton")},
            progress=progress,
        )
    click.echo(said)


COMMANDS = (tune,)
