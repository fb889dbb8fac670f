"""Files as people have them: every encoding and compression read right, or refused with file, line and a way out."""

import bz2
import gzip
import json
import lzma
import os
import threading

import pytest

from omnigene_fast.cli import main
from omnigene_fast.tracing.exchange import import_run
from omnigene_fast.tracing.texts import read_rows

TEXTS = ["ACGT", "Zoë – 日本 𝒳", "M\u2028K"]
GOOD = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
ONE = b'{"text": "ACGT"}\n'


@pytest.mark.parametrize(
    "data",
    {
        "plain": GOOD.encode(),
        "mark": GOOD.encode("utf-8-sig"),
        "marks inside": ONE + GOOD.encode("utf-8-sig"),
        "utf-16": GOOD.encode("utf-16"),
        "utf-16 big": b"\xfe\xff" + GOOD.encode("utf-16-be"),
        "utf-16 unmarked": GOOD.encode("utf-16-le"),
        "utf-32": GOOD.encode("utf-32"),
        "carriage returns": GOOD.replace("\n", "\r\n").encode(),
        "old Mac": GOOD.replace("\n", "\r").encode(),
        "no last newline": GOOD[:-1].encode(),
        "escaped pair": GOOD.replace("𝒳", "\\ud835\\udcb3").encode(),
        "gzip": gzip.compress(GOOD.encode()),
        "gzip of utf-16": gzip.compress(GOOD.encode("utf-16")),
        "two gzip members": gzip.compress(ONE) + gzip.compress(GOOD.encode("utf-8-sig")),
        "bzip2": bz2.compress(GOOD.encode()),
        "xz": lzma.compress(GOOD.encode()),
    }.items(),
    ids=lambda item: item[0],
)
def test_texts_are_read_right(tmp_path, data):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data[1])
    texts = [row.text for row in read_rows(path)]
    assert texts[-3:] == TEXTS
    assert len(texts) == 3 + (data[0] in ("marks inside", "two gzip members"))
    assert [row.number for row in read_rows(path)] == list(range(len(texts)))


BAD = {
    "latin-1": (ONE + b'{"text": "caf\xe9"}\n', "line 2: expected UTF-8, got the byte 0xe9 at character 14", "iconv"),
    "cut character": (ONE + '{"text": "日'.encode()[:-1], "line 2: expected UTF-8, got the byte 0xe6", "iconv"),
    "encoded surrogate": (ONE + b'{"text": "\xed\xa0\x80"}\n', "line 2: expected UTF-8, got the byte 0xed", "iconv"),
    "surrogate": (ONE + b'{"text": "a\\ud800b"}\n', "line 2: ", "lone surrogate U+D800 at character 2; put U+FFFD"),
    "surrogate in utf-16": ('{"text": "\ud800"}'.encode("utf-16", "surrogatepass"), "line 1: ", "surrogate U+D800"),
    "odd utf-16": (GOOD.encode("utf-16")[:-1], "truncated data", "copy the file again"),
    "cut gzip": (gzip.compress(GOOD.encode() * 99)[:-9], "reading stopped after line", "copy the file again"),
    "damaged gzip": (gzip.compress(GOOD.encode())[:-8] + bytes(8), "reading stopped after line", "copy the file again"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(9), "got Zstandard's compression", "zstd -d"),
    "zip": (b"PK\x03\x04" + bytes(9), "got a zip archive", "unpack it"),
    "parquet": (b"PAR1" + bytes(9), "got Parquet", "write it as JSON lines"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer", "git lfs pull"),
    "deep": (ONE + b"[" * 100_000 + b"\n", "line 2: expected a JSON object", "every line is read as one object"),
    "null text": (ONE + b'{"text": null}\n', "line 2: expected a text in the column 'text', got null", "--text-col"),
    "number": (ONE + b'{"text": 5}\n', "line 2: expected a text in the column 'text', got int", "--text-col"),
    "no text": (
        ONE + b'{"body": "a"}\n',
        "expected a text in the column 'text', got only 'body'",
        "--text-col",
    ),
    "list": (b'[{"text": "a"}]\n', "line 1: expected a JSON object, got list", "every line is read as one object"),
    "label": (b'{"text": "a", "task": "\\ud800"}\n', "line 1: expected the value of the label 'task'", "surrogates"),
    "label list": (b'{"text": "a", "task": [1]}\n', "line 1: expected text or a number in the label 'task'", "--label"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_with_a_way_out(tmp_path, name):
    data, *said = BAD[name]
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data: .*d\.jsonl") as error:
        read_rows(path, labels=("task",) if name.startswith("label") else ())
    for words in said:
        assert words in str(error.value)


def test_what_lies_behind_the_limit_is_not_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(ONE + ONE + b"{\n")
    assert len(read_rows(path, limit=2)) == 2
    with pytest.raises(ValueError, match="line 3"):
        read_rows(path, limit=3)


def response(doc):
    return {"choices": [{"prompt_token_ids": [doc], "token_ids": [2], "routed_experts": [[[0, 1]], [[1, 2]]]}]}


@pytest.mark.parametrize("encode", [lambda t: t.encode("utf-8-sig"), lambda t: gzip.compress(t.encode("utf-16"))])
def test_imports_read_the_same_files(tmp_path, encode):
    text = "".join(json.dumps(response(doc)) + "\n" for doc in range(3))
    (tmp_path / "plain").write_text(text)
    (tmp_path / "other").write_bytes(encode(text))
    known = {"num_experts": 4}
    runs = [
        import_run(tmp_path / n, tmp_path / f"{n}-run", "vllm", meta=known, last="routed") for n in ("plain", "other")
    ]
    assert len(runs[0].documents) == 3
    assert (runs[0].counts == runs[1].counts).all()


def test_imports_name_file_and_line(tmp_path):
    (tmp_path / "bad").write_bytes(json.dumps(response(0)).encode() + b'\n{"choices": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"bad, line 2: expected UTF-8, got the byte 0xe9"):
        import_run(tmp_path / "bad", tmp_path / "run", "vllm", meta={"num_experts": 4}, last="routed")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [GOOD.encode(), gzip.compress(GOOD.encode())], ids=["plain", "gzip"])
def test_a_pipe_is_read_once(tmp_path, data):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write():
        with open(pipe, "wb") as file:
            file.write(data[:1])  # the first bytes need not come together
            file.flush()
            file.write(data[1:])

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert [row.text for row in read_rows(pipe, limit=2)] == TEXTS[:2]
    writer.join(10)
    assert not writer.is_alive()


@pytest.mark.parametrize("verb", ["verify", "decompose", "report"])
def test_ctrl_c_is_one_sentence(monkeypatch, verb):
    from click.testing import CliRunner

    import omnigene_fast

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(omnigene_fast, "open_trace", interrupted)
    done = CliRunner().invoke(main, [verb, *(["run"] * (3 if verb == "decompose" else 1))])
    assert done.exit_code == 130
    assert done.output == f"Error: {verb}: interrupted; nothing was written; start it again.\n"
