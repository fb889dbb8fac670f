"""The verbs of router traces: trace, verify, report, decompose, export, import."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .cli_options import DTYPES, Interrupted, dtype_of, parse_device, sentence, set_threads, words

RUN = click.Path(path_type=Path)
WEIGHTS = click.option(
    "--weights",
    type=click.Choice(["tokens", "documents"]),
    default="tokens",
    show_default=True,
    help="Documents count by their tokens, or all the same.",
)


@click.command()
@click.argument("model", type=RUN)
@click.argument("data", type=RUN)
@click.option("--out", required=True, type=RUN, help="Directory of the run; one that was interrupted is continued.")
@click.option("--text-col", default="text", show_default=True, help="Column with the text.")
@click.option("--label-col", "labels", multiple=True, help="Column that becomes a label; may be given several times.")
@click.option("--limit", type=click.IntRange(min=1), help="Rows, from the beginning.")
@click.option("--max-length", default=1024, show_default=True, type=click.IntRange(min=1), help="Tokens of a text.")
@click.option("--batch-tokens", default=4096, show_default=True, type=click.IntRange(min=1), help="Tokens of a batch.")
@click.option("--record", default="ids,weights,stats", show_default=True, help="Kept per token; '' for counts alone.")
@click.option("--adapter", type=RUN, help="A PEFT adapter to put on the model.")
@click.option("--stock", is_flag=True, help="Do not accelerate the model: forward hooks record.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's choice by default.")
@sentence
def trace(
    model: Path,
    data: Path,
    out: Path,
    text_col: str,
    labels: tuple[str, ...],
    limit: int | None,
    max_length: int,
    batch_tokens: int,
    record: str,
    adapter: Path | None,
    stock: bool,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Record which experts the tokens of DATA (JSON lines) visit in MODEL, a checkpoint directory with a tokenizer.

    Every line is a document. Killed and started again with the same arguments, it goes on where it was; labels that
    were corrected or added since are taken, and another checkpoint, adapter, tokenizer, text or dtype is refused.

    \b
    Example:
      omnigene-fast trace ./gemma-4-26B-A4B texts.jsonl --label-col task --out runs/base
    """
    from . import accelerate, checkpoint, open_trace
    from .tracing import layout
    from .tracing.records import check_record
    from .tracing.texts import read_rows, trace_texts

    # A mistake is found before the weights are loaded, which takes minutes.
    chosen = parse_device(device)
    set_threads(threads)
    meta: dict[str, Any] = {"record": list(check_record(words(record, ()) if record.strip() else ()))}
    layout.check_target(out, meta)
    checkpoint.check(model)
    if adapter is not None:
        _need_peft()
        checkpoint.check_adapter(adapter)
    rows = read_rows(data, text_col, labels, limit)
    tokenizer = checkpoint.load_tokenizer(model)
    meta |= {
        "model": str(adapter or model),
        "tokenizer": str(model),
        "data": data.name,
        "max_length": max_length,
        "weights_digest": checkpoint.digest(model),
        "adapter_digest": None if adapter is None else checkpoint.adapter_digest(adapter),
        "tokenizer_digest": checkpoint.tokenizer_digest(model),
    }
    layout.check_target(out, meta)
    if (out / layout.META).exists() and "weights_digest" not in layout.read_meta(out):
        click.echo(f"{out} does not say which weights it was made of: that they are the same is not checked.", err=True)
    try:
        loaded = checkpoint.load_model(model, dtype_of(dtype), chosen, adapter)
        if not stock:
            accelerate(loaded)
        tracer = trace_texts(
            loaded,
            lambda texts: tokenizer(texts)["input_ids"],
            rows,
            out,
            pad=tokenizer.pad_token_id or 0,
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=True,
            record=meta["record"],
            meta=meta,
        )
    except KeyboardInterrupt:
        saved = len(open_trace(out).documents) if (out / layout.META).exists() else 0
        raise Interrupted(
            f"trace: interrupted; {saved:,} of {len(rows):,} texts are saved in {out}, and the same command goes on"
            " from there."
        ) from None
    if tracer.relabelled:
        click.echo(f"labels of {tracer.relabelled:,} documents corrected or added")
    click.echo(f"{tracer.tokens:,} tokens recorded, {tracer.dropped:,} dropped")
    click.echo(_summary(open_trace(out)))


def _need_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "adapter: expected the package peft, which is not installed; install it with `pip install peft`."
        )


@click.command()
@click.argument("run", type=RUN)
@sentence
def verify(run: Path) -> None:
    """Read a run back and check it: files, checksums, ids, counts, positions. Exits with 1 if something is wrong.

    \b
    Example:
      omnigene-fast verify runs/base
    """
    from . import open_trace

    opened = open_trace(run)
    problems = opened.verify(progress=True)
    if problems:
        raise ValueError("\n".join(problems))
    click.echo(f"sound: {_summary(opened)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("-o", "--out", default="report.html", show_default=True, type=RUN, help="HTML file; CSVs go beside it.")
@click.option("--by", default="task", show_default=True, help="Label whose values are compared.")
@click.option("--permutations", default=1000, show_default=True, type=click.IntRange(min=1), help="For noise floors.")
@click.option("--seed", default=0, show_default=True, type=int)
@WEIGHTS
@sentence
def report(runs: tuple[Path, ...], out: Path, by: str, permutations: int, seed: int, weights: str) -> None:
    """Write one self-contained HTML page about one or several runs, such as base, CPT and SFT, in this order.

    \b
    Example:
      omnigene-fast report runs/base runs/cpt runs/sft -o report.html
    """
    from . import analysis, open_trace

    opened = [_weighted(open_trace(run), weights) for run in runs]
    texts = _texts(opened[0].meta)
    click.echo(analysis.report(opened, out, by=by, permutations=permutations, seed=seed, texts=texts))


def _weighted(run: Any, weights: str) -> Any:
    from . import analysis

    return analysis.equal_weights(run) if weights == "documents" else run


def _texts(meta: dict[str, Any]) -> Callable[[int], str] | None:
    """A token id's text by the tokenizer that a run names, if it is still there and the same; else a remark."""
    from . import checkpoint

    path = Path(str(meta.get("tokenizer")))
    if not (path / "tokenizer_config.json").is_file():
        return None
    try:
        if meta.get("tokenizer_digest", found := checkpoint.tokenizer_digest(path, "tokenizer")) != found:
            raise ValueError(
                f"tokenizer: expected the one that the run was made with in {str(path)!r}, got another one."
            )
        loaded = checkpoint.load_tokenizer(path, "tokenizer")
    except (ValueError, ImportError, OSError) as error:  # no reason to lose a report
        click.echo(f"Token ids are shown without their texts: {error}", err=True)
        return None
    return lambda number: loaded.decode([number])


@click.command()
@click.argument("base", type=RUN)
@click.argument("cpt", type=RUN)
@click.argument("sft", type=RUN)
@click.option("--by", default="task", show_default=True, help="Label whose values are compared.")
@WEIGHTS
@sentence
def decompose(base: Path, cpt: Path, sft: Path, by: str, weights: str) -> None:
    """How much of the experts' differentiation came with CPT and how much with SFT, paired by document.

    \b
    Example:
      omnigene-fast decompose runs/base runs/cpt runs/sft
    """
    from . import analysis, open_trace

    first, second, third = (_weighted(open_trace(run), weights) for run in (base, cpt, sft))
    table = analysis.decompose(first, second, third, by=by)
    click.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


@click.command("export")
@click.argument("run", type=RUN)
@click.argument("format")
@click.option("-o", "--out", required=True, type=RUN, help="File or directory to write; never one that exists.")
@click.option("--by", help="npz: the label whose values are its tasks.  [default: task]")
@sentence
def export(run: Path, format: str, out: Path, by: str | None) -> None:
    """Write a run in another format.

    \b
    npz       OmniGene-4's counts per task
    datasets  Hugging Face datasets, one row per document
    eplb      the load matrix of DeepSeek's EPLB
    sglang    SGLang's responses with routed experts
    vllm      vLLM's responses with routed experts
    megatron  Megatron-LM's router trace

    \b
    Example:
      omnigene-fast export runs/base npz --by task -o base.npz
    """
    from . import open_trace
    from .tracing.exchange import export_run

    left_out = export_run(open_trace(run), out, format, **({} if by is None else {"by": by}))
    click.echo(
        f"{out}: " + (f"without {'; '.join(left_out)}, for which {format} has no place" if left_out else "whole")
    )


@click.command("import")
@click.argument("source", type=RUN)
@click.argument("format")
@click.option("--out", required=True, type=RUN, help="Directory of the new run.")
@click.option("--num-experts", type=click.IntRange(min=1), help="E, if the source does not say.")
@click.option("--top-k", type=click.IntRange(min=1), help="K, if the source does not say.")
@click.option("--layers", help="Decoder indices of the source's layers, such as 0-29 or 1,3,5, if it does not say.")
@click.option("--model", help="Name of the model, if the source does not say.")
@click.option("--label", "labels", multiple=True, metavar="NAME=TEXT", help="Label of every document.")
@sentence
def import_(
    source: Path,
    format: str,
    out: Path,
    num_experts: int | None,
    top_k: int | None,
    layers: str | None,
    model: str | None,
    labels: tuple[str, ...],
) -> None:
    """Make a run from a file or directory of another format; the formats are those of `export`.

    \b
    Example:
      omnigene-fast import traces/ megatron --num-experts 128 --layers 0-29 --out runs/megatron
    """
    from .tracing.exchange import import_run

    meta = {"num_experts": num_experts, "top_k": top_k, "layers": _layers(layers), "model": model}
    named = dict(label.split("=", 1) for label in labels if "=" in label)
    if len(named) != len(labels):
        raise ValueError(f"--label: expected NAME=TEXT, each name once, got {' '.join(labels)}.")
    known = {name: value for name, value in meta.items() if value is not None}
    click.echo(_summary(import_run(source, out, format, meta=known or None, labels=named or None)))


def _layers(text: str | None) -> list[int] | None:
    """Decoder indices from a text such as 0-29 or 1,3,5."""
    if text is None:
        return None
    found: list[int] = []
    for part in words(text, ()):
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"--layers: expected decoder indices such as 0-29 or 1,3,5, got {text!r}.")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return found


def _summary(run: Any) -> str:
    documents = run.documents
    return (
        f"{run.path}: {int(documents['n_tokens'].sum()):,} tokens of {len(documents):,} documents"
        f" (labels: {', '.join(run.labels) or 'none'}), {len(run.layers)} layers, {run.num_experts} experts,"
        f" top-{run.top_k}, {', '.join(('counts', *run.record))}"
    )


COMMANDS = (trace, verify, report, decompose, export, import_)
