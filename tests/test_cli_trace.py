"""The verbs of router traces, on a small checkpoint: traced, read back, reported, and bad input in one sentence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import omnigene_fast
from omnigene_fast.analysis.groups import distinct
from omnigene_fast.cli import main
from omnigene_fast.demo.model import Size, load_texts, small_model

SIZE = Size(H=64, I=24, E=16, K=4, layers=3)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a tokenizer, texts of three families, and a run of them."""
    from transformers import ByT5Tokenizer

    path = tmp_path_factory.mktemp("cli")
    small_model(SIZE, torch.device("cpu"))[0].save_pretrained(path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(path / "model")
    rows = [
        {"text": text[: 20 + 7 * number], "task": family, "split": number}
        for family, texts in list(load_texts(8).items())[:3]
        for number, text in enumerate(texts)
    ]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = invoke(*trace(path, path / "run"))
    assert done.exit_code == 0, done.output
    return path


def trace(path, out, *more):
    columns = ("--label-col", "task", "--label-col", "split")
    return ("trace", path / "model", path / "data.jsonl", *columns, "--out", out, "--batch-tokens", 200, *more)


def test_traces_every_row_as_a_document(files):
    run = omnigene_fast.open_trace(files / "run")
    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    documents = run.documents
    assert documents["doc_id"].tolist() == list(range(24))
    assert documents["task"].tolist() == [row["task"] for row in rows]
    assert documents["split"].tolist() == [str(row["split"]) for row in rows]
    for (_, records), row in zip(sorted(run.iter_documents(), key=lambda each: each[0]["doc_id"]), rows, strict=True):
        assert records.token.tolist() == [*(3 + byte for byte in row["text"].encode()), 1]
    assert run.meta["model"] == str(files / "model")
    assert run.meta["numerics"] == "hf"


def test_info_and_verify(files):
    shown = invoke("info", files / "run")
    assert shown.exit_code == 0, shown.output
    for part in ("24", "3 (0-2), 16 experts, top-4", "label task", "dna_coding", "counts, ids, weights, stats"):
        assert part in shown.output
    assert "sound: " in invoke("verify", files / "run").output


def test_verify_finds_a_damaged_file(files, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(files / "run", copy)
    part = next(copy.glob("part-*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    found = invoke("verify", copy)
    assert found.exit_code == 1
    assert part.name in found.output


def test_stock_and_accelerated_record_the_same_counts_in_float32(files, tmp_path):
    for name, more in (("ours", ()), ("stock", ("--stock",))):
        done = invoke(*trace(files, tmp_path / name, "--dtype", "float32", *more))
        assert done.exit_code == 0, done.output
    ours, stock = (omnigene_fast.open_trace(tmp_path / name) for name in ("ours", "stock"))
    assert stock.meta["numerics"] == "stock"
    assert np.abs(ours.counts - stock.counts).sum() <= 0.002 * stock.counts.sum()


def test_a_killed_run_is_continued_to_the_same_end(files, tmp_path):
    """Batches are made of all rows, so what is traced after the kill is what would have been traced without it."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from omnigene_fast.tracing.store import Writer\n"
        "from omnigene_fast.cli import main\n"
        "add = Writer.add\n"
        "def slow(self, *a, **k):\n"
        "    add(self, *a, **k); self.commit(); time.sleep(0.3)\n"
        "Writer.add = slow\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "run"
    command = [sys.executable, script, *map(str, trace(files, out))]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    held = len(omnigene_fast.open_trace(out).documents)
    assert 0 < held < 24
    done = invoke(*trace(files, out))
    assert done.exit_code == 0, done.output
    run, whole = omnigene_fast.open_trace(out), omnigene_fast.open_trace(files / "run")
    assert run.verify() == []
    assert run.documents.equals(whole.documents)
    assert np.array_equal(run.counts, whole.counts)
    again = invoke(*trace(files, out))
    assert again.exit_code == 0
    assert "0 tokens recorded" in again.output


def test_other_texts_are_not_taken_for_those_held(files, tmp_path):
    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    rows[3]["text"] += "X"
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ("--label-col", "task", "--label-col", "split")
    done = invoke("trace", files / "model", tmp_path / "other.jsonl", *columns, "--out", files / "run")
    assert done.exit_code == 1
    assert "got another one in line 4" in done.output
    assert omnigene_fast.open_trace(files / "run").verify() == []


def test_a_row_without_a_label_gets_none(files, tmp_path):
    rows = [{"text": "ACGT" * (5 + i), **({"task": f"t{i}"} if i < 2 else {})} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--label-col", "task", "--out", tmp_path / "run", "--batch-tokens", 60)
    done = invoke("trace", files / "model", tmp_path / "x.jsonl", *more)
    assert done.exit_code == 0, done.output
    tasks = omnigene_fast.open_trace(tmp_path / "run").documents["task"]
    assert [None if task is None or task != task else task for task in tasks] == ["t0", "t1", None, None]


def test_an_adapter_is_traced(files, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["router.proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    done = invoke(*trace(files, tmp_path / "run", "--adapter", tmp_path / "adapter"))
    assert done.exit_code == 0, done.output
    run, base = omnigene_fast.open_trace(tmp_path / "run"), omnigene_fast.open_trace(files / "run")
    assert run.meta["model"] == str(tmp_path / "adapter")
    assert (run.counts != base.counts).any()
    decomposed = invoke("decompose", files / "run", tmp_path / "run", tmp_path / "run")
    assert decomposed.exit_code == 0, decomposed.output
    assert "d_cpt" in decomposed.output
    assert "divergence" in decomposed.output


def test_report(files, tmp_path):
    done = invoke("report", files / "run", "-o", tmp_path / "r.html", "--permutations", 50)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "r.html")
    assert "dna_coding" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r_data" / "load.csv").exists()


def test_a_report_that_fails_leaves_nothing(files, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(files / "run", tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    command = ("report", tmp_path / "run", "--permutations", 5, "-o")
    (tmp_path / "run" / "file").write_text("x")
    assert "is a file; choose another path" in invoke(*command, tmp_path / "run" / "file" / "r.html").output
    monkeypatch.setattr(os, "fsync", full)
    for out in (tmp_path / "r.html", tmp_path / "a" / "b" / "r.html"):
        done = invoke(*command, out)
        assert done.exit_code == 1
        assert "No space left on device: " in done.output
        assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert invoke(*command, tmp_path / "r.html").exit_code == 0
    data = {file.name: file.read_bytes() for file in (tmp_path / "r_data").iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    assert invoke(*command, tmp_path / "r.html").exit_code == 1
    assert data == {file.name: file.read_bytes() for file in (tmp_path / "r_data").iterdir()}


def test_runs_of_one_name_are_told_apart_by_their_paths(files, tmp_path):
    rows = (files / "data.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:20]))
    more = ("--label-col", "task", "--out", tmp_path / "cpt" / "run")
    assert invoke("trace", files / "model", tmp_path / "fewer.jsonl", *more).exit_code == 0
    shutil.copytree(files / "run", tmp_path / "base" / "run")
    base, cpt = tmp_path / "base" / "run", tmp_path / "cpt" / "run"
    done = invoke("decompose", base, base, cpt)
    assert done.exit_code == 1
    assert "the same documents in 'base/run' and 'cpt/run'" in done.output
    done = invoke("report", base, cpt, base, "-o", tmp_path / "r.html", "--permutations", 5)
    assert "got others" not in done.output
    names = distinct([omnigene_fast.open_trace(path) for path in (base, cpt, base)])
    assert names == ["base/run", "cpt/run", "base/run (2)"]


def test_a_report_does_not_read_token_ids_by_another_tokenizer(files, tmp_path):
    from transformers import ByT5Tokenizer

    shutil.copytree(files / "model", tmp_path / "model")
    more = ("--label-col", "task", "--out", tmp_path / "run")
    assert invoke("trace", tmp_path / "model", files / "data.jsonl", *more).exit_code == 0
    ByT5Tokenizer(extra_ids=9).save_pretrained(tmp_path / "model")
    done = invoke("report", tmp_path / "run", "-o", tmp_path / "r.html", "--permutations", 5)
    assert done.exit_code == 0, done.output
    assert "shown without their texts: tokenizer: expected the one that the run was made with" in done.output


def test_export_and_import(files, tmp_path):
    done = invoke("export", files / "run", "npz", "--by", "task", "-o", tmp_path / "run.npz")
    assert done.exit_code == 0, done.output
    run = omnigene_fast.open_trace(files / "run")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as arrays:
        for task in ("protein", "dna_coding", "dna_genomic"):
            of = (run.documents["task"] == task).to_numpy()
            assert np.array_equal(arrays[f"{task}__counts"], run.counts[of].sum(0))
    done = invoke("import", tmp_path / "run.npz", "npz", "--out", tmp_path / "back")
    assert done.exit_code == 0, done.output
    assert np.array_equal(omnigene_fast.open_trace(tmp_path / "back").counts.sum(0), run.counts.sum(0))


def test_help_names_every_format():
    from omnigene_fast.tracing.exchange import FORMATS

    text = invoke("export", "--help").output
    assert all(f"\n  {name} " in text for name in FORMATS)


def test_import_of_what_does_not_say_its_shape(tmp_path):
    np.save(tmp_path / "load.npy", np.array([[5, 3, 0], [1, 3, 4]]))
    more = ("--top-k", 2, "--layers", "1,3", "--model", "m", "--label", "task=dna")
    done = invoke("import", tmp_path / "load.npy", "eplb", "--out", tmp_path / "run", *more)
    assert done.exit_code == 0, done.output
    run = omnigene_fast.open_trace(tmp_path / "run")
    assert run.layers == [1, 3]
    assert run.counts.tolist() == [[[5, 3, 0], [1, 3, 4]]]
    assert run.documents["task"].tolist() == ["dna"]
    for wrong in (("--layers", "1-x"), ("--label", "task")):
        done = invoke("import", tmp_path / "load.npy", "eplb", "--out", tmp_path / "other", *wrong)
        assert done.exit_code == 1
        assert f"{wrong[0]}: expected" in done.output


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (None, (), "data: expected a JSON-lines file, got"),
        ("", (), "data: expected at least one row"),
        ('{"text": "a"}\n{"text": 1', (), "x.jsonl, line 2: expected a JSON object, got what is not JSON"),
        ('{"body": "a"}', (), "x.jsonl, line 1: expected a text in the column 'text', got only 'body'"),
        ('{"text": "a"}', ("--label-col", "task"), "labels: expected a column of"),
        ('{"text": "a", "doc_id": "x"}', ("--label-col", "doc_id"), "no column of the store"),
        ('{"text": "a"}', ("--record", "logits"), "record: expected some of ids, weights, stats, got 'logits'"),
    ],
)
def test_bad_input_is_one_sentence(files, tmp_path, data, more, message):
    path = tmp_path / "x.jsonl"
    if data is not None:
        path.write_text(data)
    done = invoke("trace", files / "model", path, "--out", tmp_path / "run", *more)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.strip().count("Error:") == 1
    assert not list((tmp_path / "run").glob("*.parquet"))


def test_paths_that_are_no_runs(files, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for verb in ("info", "verify", "report"):
        done = invoke(verb, tmp_path / "mine")
        assert done.exit_code == 1, done.output
    done = invoke(*trace(files, tmp_path / "mine"))
    assert done.exit_code == 1
    assert "choose another path" in done.output
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    done = invoke("trace", tmp_path, files / "data.jsonl", "--out", tmp_path / "run")
    assert "model: expected a checkpoint directory with a config.json" in done.output
