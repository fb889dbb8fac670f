"""A trace that is continued: labels may be corrected; other weights, texts, tokenizers, lengths, dtypes are refused."""

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
from omnigene_fast import checkpoint
from omnigene_fast.cli import main
from omnigene_fast.demo.model import Size, small_model
from omnigene_fast.tracing import layout
from omnigene_fast.tracing.merge import merge
from omnigene_fast.tracing.records import Records
from omnigene_fast.tracing.store import Writer

SIZE = Size(H=64, I=24, E=16, K=4, layers=3)
ROWS = [{"text": "ACGT" * (k + 2), "task": "dna"} for k in range(6)]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def save(path, seed=0, **options):
    from transformers import ByT5Tokenizer

    small_model(SIZE, torch.device("cpu"), seed)[0].save_pretrained(path, **options)
    ByT5Tokenizer(extra_ids=0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and a run of the first three rows."""
    path = tmp_path_factory.mktemp("made")
    save(path / "model")
    done = trace(path, ROWS[:3], path / "run")
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture
def place(made, tmp_path):
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trace(place, rows, out, *more, model=None, labels=("task",)):
    columns = [each for name in labels for each in ("--label-col", name)]
    data = write(place / "d.jsonl", rows)
    return invoke("trace", model or place / "model", data, *columns, "--out", out, "--dtype", "float32", *more)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".json", ".jsonl", ".parquet")}


def refused(done, place, *said):
    """One sentence, with these words, and a run as it was."""
    assert done.exit_code == 1, done.output
    assert done.output.count("Error:") == 1
    assert len([line for line in done.output.splitlines() if "Error:" in line]) == 1
    for words in said:
        assert words in done.output, done.output
    assert content(place / "run") == content(place / "before")
    return done


@pytest.fixture
def kept(place):
    shutil.copytree(place / "run", place / "before")
    return place


def test_the_same_arguments_go_on(place):
    done = trace(place, ROWS, place / "run")
    assert done.exit_code == 0, done.output
    assert "not checked" not in done.output
    assert trace(place, ROWS, place / "whole").exit_code == 0
    run, whole = (omnigene_fast.open_trace(place / name) for name in ("run", "whole"))
    assert run.documents.equals(whole.documents)
    assert np.array_equal(run.counts, whole.counts)
    assert run.verify() == []


def test_labels_are_corrected_and_added(place):
    before = omnigene_fast.open_trace(place / "run")
    rows = [row | {"task": "protein", "split": k} for k, row in enumerate(ROWS)]
    done = trace(place, rows, place / "run", labels=("task", "split"))
    assert done.exit_code == 0, done.output
    assert "labels of 3 documents corrected or added" in done.output
    run = omnigene_fast.open_trace(place / "run")
    assert run.documents["task"].tolist() == ["protein"] * 6
    assert run.documents["split"].tolist() == list("012345")
    assert np.array_equal(run.counts[:3], before.counts)
    assert run.documents["text_hash"][:3].equals(before.documents["text_hash"])
    assert run.verify() == []
    assert [len(records) for _, records in run.iter_documents()] == run.documents["n_tokens"].tolist()
    again = trace(place, rows, place / "run", labels=("task", "split"))
    assert again.exit_code == 0
    assert "labels of" not in again.output


def test_labels_of_a_complete_run_are_corrected_one_by_one(place):
    rows = [ROWS[0], ROWS[1] | {"task": "rna"}, ROWS[2]]
    done = trace(place, rows, place / "run")
    assert done.exit_code == 0, done.output
    assert "labels of 1 documents corrected" in done.output
    run = omnigene_fast.open_trace(place / "run")
    assert run.documents["task"].tolist() == ["dna", "rna", "dna"]
    assert run.verify() == []
    exported = invoke("export", place / "run", "datasets", "-o", place / "set")
    assert exported.exit_code == 0, exported.output


@pytest.mark.parametrize("record", ["", "ids", "ids,weights,stats"])
def test_every_reader_takes_corrected_labels(place, record):
    """SQL, a merged run and a run of counts alone: labels are the last ones, tokens and counts as they were."""
    assert trace(place, ROWS, place / "again", "--record", record).exit_code == 0
    before = omnigene_fast.open_trace(place / "again")
    corrected = [row | {"task": f"t{k}"} for k, row in enumerate(ROWS)]
    assert trace(place, corrected, place / "again", "--record", record).exit_code == 0
    run = omnigene_fast.open_trace(place / "again")
    merged = merge([run], place / "merged")
    for one in (run, merged):
        assert one.documents["task"].tolist() == [f"t{k}" for k in range(6)]
        assert one.documents["n_tokens"].equals(before.documents["n_tokens"])
        assert np.array_equal(one.counts, before.counts)
        assert one.verify() == []
        assert one.sql("select sum(picks) from counts").fetchall()[0][0] == before.counts.sum()
        assert one.sql("select count(*) from documents where task = 't3'").fetchall()[0][0] == 1


def test_a_label_that_changes_with_tokens_is_still_a_fault(place):
    """Negative control: only a row without tokens corrects a label."""
    meta = {"layers": [0], "num_experts": 4, "top_k": 1, "model": "m"}
    with Writer(place / "w", meta, record=("ids",)) as writer:
        for pos, task in enumerate("ab"):
            one, byte = np.full(1, pos, np.int32), np.zeros(1, np.uint8)
            writer.add(Records(np.zeros(1, np.int64), one, one, byte, byte[None, None]), {0: {"task": task}})
            writer.commit()
        assert len(omnigene_fast.open_trace(place / "w").verify()) == 1


@pytest.mark.parametrize("labels", [(), ("task",)])
def test_a_label_is_not_taken_away(kept, labels):
    rows = [row | {"task": None} if k == 1 and labels else row for k, row in enumerate(ROWS)]
    done = trace(kept, rows, kept / "run", labels=labels)
    refused(done, kept, "labels: expected the label 'task'", f"line {2 if labels else 1}", "--label-col task")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([ROWS[0], ROWS[1] | {"text": "TTTT"}, *ROWS[2:]], 2),
        ([ROWS[1], ROWS[0], *ROWS[2:]], 1),
        ([*ROWS[:2], *ROWS[3:]], 3),
        ([ROWS[5], *ROWS], 1),
    ],
    ids=["changed", "reordered", "removed", "inserted"],
)
def test_other_texts_are_refused_before_one_is_traced(kept, rows, line):
    refused(trace(kept, rows, kept / "run"), kept, f"got another one in line {line};")


def test_a_shorter_file_is_refused(kept):
    refused(trace(kept, ROWS[:2], kept / "run"), kept, "got none in line 3")
    refused(trace(kept, ROWS, kept / "run", "--limit", 1), kept, "got none in line 2")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--record", "ids"), "run with record "),
        (("--record", ""), "run with record "),
        (("--max-length", 2000), "run with max_length 1024, got 2000"),
        (("--dtype", "bfloat16"), "run with dtype 'float32', got 'bfloat16'"),
        (("--stock",), "run with numerics 'hf', got 'stock'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_other_options_are_refused(kept, more, said):
    refused(trace(kept, ROWS, kept / "run", *more), kept, said, "choose another path")


def test_stored_bits_of_the_experts_are_part_of_the_run(tmp_path):
    ids = torch.arange(1, 9)[None]
    for bits, ends in ((None, True), (None, True), ("int8", False)):
        model, _, _ = small_model(SIZE, torch.device("cpu"))
        omnigene_fast.accelerate(model, **({} if bits is None else {"experts_dtype": bits}))
        tracer = omnigene_fast.trace(model, tmp_path / "run")
        if ends:
            with tracer, torch.no_grad():
                model(ids)
        else:
            with pytest.raises(ValueError, match="run with quantization None, got 'experts int8"), tracer:
                pass


def test_other_weights_are_refused(kept):
    save(kept / "model", seed=1)
    refused(trace(kept, ROWS, kept / "run"), kept, "run with weights_digest ", "the checkpoint is another one")


def test_one_changed_expert_is_other_weights(kept):
    model, _, _ = small_model(SIZE, torch.device("cpu"))
    model.model.layers[1].experts.down_proj.data[3, 0] += 1
    model.save_pretrained(kept / "model")
    refused(trace(kept, ROWS, kept / "run"), kept, "run with weights_digest ")


def test_another_tokenizer_is_refused(kept):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=5).save_pretrained(kept / "model")
    refused(trace(kept, ROWS, kept / "run"), kept, "run with tokenizer_digest ", "the tokenizer is another one")


def test_an_adapter_is_part_of_the_run(kept):
    from peft import LoraConfig, get_peft_model

    def adapt(seed, name):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["router.proj"], init_lora_weights=False)
        get_peft_model(small_model(SIZE, torch.device("cpu"))[0], config).save_pretrained(kept / name)

    adapt(0, "one"), adapt(1, "two")
    refused(trace(kept, ROWS, kept / "run", "--adapter", kept / "one"), kept, "run with adapter_digest None")
    assert trace(kept, ROWS[:3], kept / "adapted", "--adapter", kept / "one").exit_code == 0
    shutil.move(kept / "one", kept / "moved")
    assert trace(kept, ROWS, kept / "adapted", "--adapter", kept / "moved").exit_code == 0
    for other in ((), ("--adapter", kept / "two")):
        done = trace(kept, ROWS, kept / "adapted", *other)
        assert done.exit_code == 1
        assert "run with adapter_digest " in done.output


@pytest.mark.parametrize("how", ["relative", "moved", "link", "shards"])
def test_the_same_checkpoint_elsewhere_is_the_same_model(place, monkeypatch, how):
    model = place / "model"
    if how == "relative":
        monkeypatch.chdir(place)
        model = "model"
    elif how == "link":
        (place / "link").symlink_to(model)
        model = place / "link"
    elif how == "moved":
        model = shutil.move(model, place / "elsewhere")
    else:
        model = save(place / "shards", max_shard_size="100KB")
        assert (model / "model.safetensors.index.json").exists()
    done = trace(place, ROWS, place / "run", model=model)
    assert done.exit_code == 0, done.output
    assert len(omnigene_fast.open_trace(place / "run").documents) == 6


def age(run, **changes):
    """Rewrite meta.json as before there were digests."""
    meta = {key: value for key, value in layout.read_meta(run).items() if not key.endswith("_digest")}
    layout.write_file(run, layout.META, json.dumps(meta | changes).encode())


def test_a_run_without_digests_is_continued(place, monkeypatch):
    age(place / "run", model=str(place / "model"))
    monkeypatch.chdir(place)
    done = trace(place, ROWS, place / "run", model="model")
    assert done.exit_code == 0, done.output
    assert "that they are the same is not checked" in done.stderr
    shutil.copytree(place / "run", place / "before")
    refused(trace(place, ROWS, place / "run", model=shutil.copytree("model", "copy")), place, "run with model ")


def test_the_digest_samples_large_tensors(tmp_path):
    """Of a tensor beyond 1 MiB a change of 2 MiB in a row is seen, wherever it lies; so is its last value."""
    from safetensors.torch import save_file

    def digest(changed, dtype=torch.uint8):
        weight = torch.zeros(4 << 20, dtype=torch.uint8)
        weight[changed] = 1
        save_file({"w": weight.view(dtype)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return checkpoint.digest(tmp_path)

    nothing = digest(slice(0))
    assert digest(slice(0)) == nothing
    for first in (0, 1, 700_000, 1 << 20, 2 << 20):
        assert digest(slice(first, first + (2 << 20))) != nothing, first
    assert digest(slice(-1, None)) != nothing
    assert digest(slice(0), torch.int8) != nothing


def test_the_digest_of_a_pickle_sees_every_value(tmp_path):
    def digest(at):
        weights = {"w": torch.zeros(2 << 20), "router.proj.weight": torch.zeros(64)}
        weights["w"][at] += 1
        torch.save(weights, tmp_path / "pytorch_model.bin")
        return checkpoint.digest(tmp_path)

    assert digest(300_001) == digest(300_001)
    assert len({digest(at) for at in (300_001, 300_002, 1_900_000)}) == 3


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(place, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from omnigene_fast.tracing.store import Writer\n"
        "from omnigene_fast.cli import main\n"
        "add = Writer.add\n"
        "def slow(self, *a, **k):\n"
        "    add(self, *a, **k); self.commit(); time.sleep(0.5)\n"
        "Writer.add = slow\n"
        "main(sys.argv[1:])\n"
    )
    data = write(place / "long.jsonl", ROWS)
    out = tmp_path / "out"
    command = [sys.executable, script, "trace", place / "model", data, "--out", out, "--batch-tokens", 1]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    held = len(omnigene_fast.open_trace(out).documents)
    assert child.returncode == 130, said
    assert "Aborted" not in said
    assert f"trace: interrupted; {held} of 6 texts are saved in {out}" in said
    assert "goes on" in said


def test_negative_control_the_fixture_models_route_differently(place):
    """Else a mixed run could not be told from a sound one."""
    save(place / "other", seed=1)
    assert trace(place, ROWS[:3], place / "second", model=place / "other").exit_code == 0
    runs = [omnigene_fast.open_trace(place / name) for name in ("run", "second")]
    assert (runs[0].counts != runs[1].counts).any()
