"""The verb `kernels`: the resource report."""

import importlib.util
import os
from pathlib import Path

import click

from .cli_options import numbers, sentence, words

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--arch", "arches", help="Comma-separated compute capabilities.  [default: 80,90,100]")
@click.option("--kernel", "names", help="Comma-separated; only kernels whose name contains one of these.")
@click.option("--json", "json_path", type=FILE, help="Write the rows there; - for the terminal.")
@click.option("--markdown", "markdown_path", type=FILE, help="Write the page of docs/kernels.md there.")
@click.option("--check", is_flag=True, help="Exit with 1 and a sentence for each offence, if there is one.")
@sentence
def kernels(
    arches: str | None,
    names: str | None,
    json_path: Path | None,
    markdown_path: Path | None,
    check: bool,
) -> None:
    """Compile every kernel in every configuration, without a GPU, and report what each takes and must take.

    Registers, spills, shared memory, blocks per multiprocessor, tensor-core instructions and the widest load come from
    the machine code; bytes, FLOPs, waves and the floor from a model. Results are kept in the user's cache directory.

    \b
    Example:
      omnigene-fast kernels --arch 90 --kernel expert_up
      omnigene-fast kernels --check
      omnigene-fast kernels --markdown docs/kernels.md
    """
    _need_compiler()
    for path in (json_path, markdown_path):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--json, --markdown: expected a file in an existing directory or -, got {str(path)!r}.")
    from tqdm import tqdm

    from .resources import cuda_kernels, launches, report, table

    wanted_arches = numbers("arch", arches, launches.ARCHES)
    found = report.find(wanted_arches, words(names, ()))
    notes = [note for arch in wanted_arches if (note := cuda_kernels.missing(arch)) is not None]
    with tqdm(total=len(found), unit="kernel", disable=None) as bar:
        rows = report.rows(found, bar.update)
    for path, render in ((json_path, table.to_json), (markdown_path, lambda rows: table.markdown(rows, notes))):
        if path is not None and str(path) != "-":
            path.write_text(render(rows), encoding="utf-8")
        elif path is not None:
            click.echo(render(rows), nl=False)
    for note in notes:
        click.echo(note, err=True)
    if json_path is None and markdown_path is None:
        click.echo(table.summary(rows) if check else table.console(rows))
    if check:
        sentences = report.offences(rows)
        for text in sentences:
            click.echo(f"- {text}", err=True)
        if sentences:
            raise ValueError(f"{len(sentences)} offences in {len(rows)} configurations.")


def _need_compiler() -> None:
    """Refuses where nothing can be compiled, before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "kernels: expected the package triton, which is not installed; install it with"
            " `pip install 'omnigene-fast[triton]'`."
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("kernels: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
