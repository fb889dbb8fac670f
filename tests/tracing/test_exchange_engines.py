"""What inference engines and Megatron-LM give away, after their schemas, and the last token that has no row."""

import base64
import io
import json
import struct

import numpy as np
import pytest

from omnigene_fast.tracing.exchange import (
    encode_sglang,
    encode_vllm,
    export_run,
    from_routed_experts,
    import_run,
    to_routed_experts,
)
from omnigene_fast.tracing.records import text_hash

from .test_exchange import ids_of, write_run


def lines(*entries) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def npy64(array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_sglang_as_its_server_answers(tmp_path):
    values = [[[4, 1], [0, 0], [7, 2]], [[3, 6], [0, 0], [5, 0]], [[1, 2], [0, 0], [2, 1]]]  # layer 1 is dense
    flat = [expert for row in values for layer in row for expert in layer]
    routed = base64.b64encode(struct.pack("<18i", *flat)).decode()
    info = {"id": "r", "prompt_tokens": 2, "completion_tokens": 2, "routed_experts": routed}
    (tmp_path / "responses.jsonl").write_bytes(lines({"text": "ab", "output_ids": [31, 32], "meta_info": info}))
    known = {"num_experts": 8, "top_k": 2, "layers": [0, 2]}
    run = import_run(tmp_path / "responses.jsonl", tmp_path / "run", "sglang", meta=known, labels=[{"task": "dna"}])
    ((row, records),) = run.iter_documents()
    assert records.ids[:, :, :].transpose(1, 0, 2).tolist() == [[row[0], row[2]] for row in values]
    assert records.token.tolist() == [-1, -1, 31]  # the prompt is not repeated, the last token was not routed
    assert records.phase.tolist() == [0, 0, 1]
    assert (row["task"], row["unrouted_token"]) == ("dna", "32")
    export_run(run, tmp_path / "again.jsonl", "sglang", num_hidden_layers=3)
    (entry,) = map(json.loads, (tmp_path / "again.jsonl").read_text().splitlines())
    assert entry["meta_info"]["routed_experts"] == routed
    assert (entry["input_ids"], entry["output_ids"]) == ([-1, -1], [31, 32])
    # dense layers taken for layers with experts; a layer with experts taken for a dense one
    for layers, error in (
        ([0, 1], "experts in layer 2"),
        ([1, 2], "experts in layer 0"),
        ([0, 1, 2], "an expert twice"),
    ):
        with pytest.raises(ValueError, match=error):
            import_run(tmp_path / "responses.jsonl", tmp_path / "no", "sglang", meta={**known, "layers": layers})

    def part(rows):
        return base64.b64encode(np.array(rows, "<i4").tobytes()).decode()

    schema = {"num_layers": 3, "top_k": 2, "moe_layer_ids": [0, 2], "input_num_rows": 1, "output_num_rows": 2}
    ext = {"input_expert_ids": part(values[:1]), "output_expert_ids": part(values[1:]), "expert_ids_schema": schema}
    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    (tmp_path / "openai.jsonl").write_bytes(lines({"choices": [{"text": "ab"}], "usage": usage, "sglext": ext}))
    openai = import_run(tmp_path / "openai.jsonl", tmp_path / "openai", "sglang", meta={"num_experts": 8, "top_k": 2})
    assert openai.layers == [0, 2]
    assert np.array_equal(openai.counts, run.counts)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_vllm_as_its_server_answers(tmp_path, dtype):
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=dtype), (4, 2, 1)), axis=2)[:, :, :2]
    choice = {"index": 0, "prompt_token_ids": [5, 6, 7], "token_ids": [31, 32], "routed_experts": npy64(ids)}
    split = {"index": 0, "token_ids": [31, 32], "routed_experts": ids[3:].tolist()}
    entries = [
        {"object": "text_completion", "choices": [choice, {**choice, "index": 1}]},
        {"prompt_token_ids": [5, 6, 7], "prompt_routed_experts": ids[:3].tolist(), "choices": [split]},
    ]
    (tmp_path / "responses.jsonl").write_bytes(lines(*entries))
    run = import_run(tmp_path / "responses.jsonl", tmp_path / "run", "vllm", meta={"num_experts": 8, "layers": [3, 9]})
    assert len(run.documents) == 3
    for _, records in run.iter_documents():
        assert np.array_equal(records.ids.transpose(1, 0, 2), ids)
        assert records.token.tolist() == [5, 6, 7, 31]
        assert records.phase.tolist() == [0, 0, 0, 1]
    export_run(run, tmp_path / "again.jsonl", "vllm")
    again = json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])["choices"][0]
    assert (again["prompt_token_ids"], again["token_ids"]) == ([5, 6, 7], [31, 32])
    stored = np.load(io.BytesIO(base64.b64decode(again["routed_experts"])))  # as vLLM's comment says to decode it
    assert stored.dtype == np.int32
    assert np.array_equal(stored, ids)
    swapped = [{**choice, "routed_experts": npy64(ids[:, ::-1])}]
    (tmp_path / "swapped.jsonl").write_bytes(lines({"choices": swapped}))
    other = import_run(
        tmp_path / "swapped.jsonl", tmp_path / "other", "vllm", meta={"num_experts": 8, "layers": [3, 9]}
    )
    assert not np.array_equal(other.counts[0], run.counts[0])  # layers permuted are seen


@pytest.mark.parametrize("encode", [np.asarray, encode_vllm, encode_sglang])
def test_the_last_token_has_no_row(tmp_path, encode):
    ids = np.array([[[1, 0]], [[2, 3]], [[4, 5]]])
    known = {"num_experts": 6, "top_k": 2}
    run = from_routed_experts([encode(ids)], [[10, 11, 12, 13]], tmp_path / "run", meta=known, prompt_lengths=[2])
    ((row, token, array),) = to_routed_experts(run)
    assert np.array_equal(array, ids)
    assert array.dtype == np.int32
    assert token.tolist() == [10, 11, 12]
    assert row["unrouted_token"] == "13"
    assert row["text_hash"] == text_hash(np.array([10, 11, 12], np.int32))
    whole = from_routed_experts([encode(ids)], [[10, 11, 12]], tmp_path / "whole", meta=known, last="routed")
    assert "unrouted_token" not in whole.documents
    late = from_routed_experts([encode(ids[1:])], [[10, 11, 12, 13]], tmp_path / "late", meta=known, start=1)
    ((_, records),) = late.iter_documents()
    assert (records.pos.tolist(), records.token.tolist()) == ([1, 2], [11, 12])
    for tokens, last in ((3, "unrouted"), (4, "routed"), (5, "unrouted")):
        with pytest.raises(ValueError, match=r"last='(un)?routed'"):
            from_routed_experts([encode(ids)], [list(range(tokens))], tmp_path / "no", meta=known, last=last)
    with pytest.raises(ValueError, match="one missing at 1"):
        from_routed_experts([encode(ids)] * 2, [[10, 11, 12, 13]], tmp_path / "no", meta=known)
    assert not (tmp_path / "no").exists()


def test_megatron_as_its_tracer_writes(tmp_path):
    def record(step, layer, ids, rank=0, **more):
        shape = {"num_tokens": len(ids), "topk": 2, "top_indices": ids}
        return {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": layer,
            "rank": rank,
            **shape,
            **more,
        }

    a, b, c, d = [[1, 0], [2, 3]], [[4, 5], [6, 7]], [[0, 7]], [[2, 1]]
    folder = tmp_path / "trace"
    folder.mkdir()
    mtp = record(0, 1, d, block="mtp", mtp_idx=0)
    (folder / "router_trace_rank0.jsonl").write_bytes(
        lines(record(0, 1, a), record(0, 2, b), mtp, record(0, 1, b), record(0, 2, a), record(1, 1, c), record(1, 2, d))
    )
    old = [{key: value for key, value in record(0, layer, c, rank=1).items() if key != "block"} for layer in (2, 1)]
    (folder / "router_trace_rank1.jsonl").write_bytes(lines(*old))
    (folder / "notes.txt").write_text("not a trace")
    run = import_run(folder, tmp_path / "run", "megatron", meta={"num_experts": 8}, layer_offset=2)
    assert (run.layers, run.top_k) == ([3, 4], 2)
    assert run.documents[["step", "rank"]].values.tolist() == [["0", "0"], ["0", "0"], ["1", "0"], ["0", "1"]]
    wanted = [[a, b], [b, a], [c, d], [c, c]]
    assert [ids.transpose(1, 0, 2).tolist() for ids in ids_of(run)] == wanted
    assert {int(records.phase[0]) for _, records in run.iter_documents()} == {2}
    one = import_run(folder, tmp_path / "one", "megatron", meta={"num_experts": 8, "layers": [2, 1]}, ranks=[1])
    assert (one.layers, len(one.documents)) == ([2, 1], 1)
    (folder / "router_trace_rank1.jsonl").write_bytes(lines(record(0, 3, c, rank=1), record(0, 4, c, rank=1)))
    with pytest.raises(ValueError, match="the ranks of a pipeline hold different layers"):
        import_run(folder, tmp_path / "no", "megatron", meta={"num_experts": 8})
    (folder / "router_trace_rank1.jsonl").write_bytes(lines(record(0, 1, c, rank=1), record(0, 2, a, rank=1)))
    with pytest.raises(ValueError, match="expected 1 tokens and top 2"):
        import_run(folder, tmp_path / "no", "megatron", meta={"num_experts": 8})


def test_megatrons_scripts_read_ours(tmp_path):
    run = write_run(tmp_path / "run")
    export_run(run, tmp_path / "out", "megatron")
    picks = np.zeros((len(run.layers), run.num_experts), int)
    for line in (tmp_path / "out" / "router_trace_rank0.jsonl").read_text().splitlines():
        r = json.loads(line)  # as in tools/moe_routing/analyze_routing_concentration.py
        assert isinstance(r["rank"], int)
        assert isinstance(r["step"], int)
        assert len(r["top_indices"]) == r["num_tokens"]
        for token_top in r["top_indices"]:
            for e in token_top:
                picks[run.layers.index(r["layer"]), e] += 1
    assert np.array_equal(picks, run.counts.sum(axis=0))


@pytest.mark.parametrize("format", ["sglang", "vllm"])
def test_whole_documents_cut_off(tmp_path, format):
    run = write_run(tmp_path / "run")
    export_run(run, tmp_path / "out", format)
    kept = (tmp_path / "out").read_bytes().splitlines(keepends=True)[:-1]
    (tmp_path / "out").write_bytes(b"".join(kept))
    with pytest.raises(ValueError, match="expected 4 documents, as it says, found 3"):
        import_run(tmp_path / "out", tmp_path / "no", format)


@pytest.mark.parametrize("num_experts", [8, 256, 512])
def test_ids_beyond_the_experts_are_refused_not_wrapped(tmp_path, num_experts):
    ids = np.array([[[0, num_experts]]])  # 256 would become 0 in a byte
    with pytest.raises(ValueError, match=f"expected expert ids in .0, {num_experts}., got {num_experts}"):
        from_routed_experts([ids], [[1, 2]], tmp_path / "no", meta={"num_experts": num_experts})
    with pytest.raises(ValueError, match="got -1"):
        from_routed_experts([np.array([[[0, -1]]])], [[1, 2]], tmp_path / "no", meta={"num_experts": num_experts})
    fits = np.array([[[0, num_experts - 1]]])
    run = from_routed_experts([fits], [[1, 2]], tmp_path / "run", meta={"num_experts": num_experts})
    assert ids_of(run)[0].tolist() == fits.tolist()


@pytest.mark.parametrize(
    ("format", "entry", "match"),
    [
        (
            "vllm",
            {"prompt_token_ids": [], "choices": [{"token_ids": [1], "routed_experts": None}]},
            "enable-return-routed-experts",
        ),
        ("vllm", {"choices": [{"token_ids": [1], "routed_experts": "AAAA"}]}, "return_token_ids"),
        ("vllm", {"output_ids": [1]}, "expected a response of vLLM"),
        ("sglang", {"choices": []}, "expected a response of SGLang"),
        ("sglang", {"meta_info": {"prompt_tokens": 1, "completion_tokens": 1}}, "return_routed_experts"),
        ("megatron", {"layer": 0, "top_indices": [[1]]}, "expected a record of Megatron"),
        ("megatron", [1], "expected a JSON object, got int"),
    ],
)
def test_foreign_lines(tmp_path, format, entry, match):
    (tmp_path / "lines.jsonl").write_bytes(lines(entry))
    with pytest.raises(ValueError, match=match):
        import_run(tmp_path / "lines.jsonl", tmp_path / "no", format, meta={"num_experts": 8, "top_k": 2})
    assert not (tmp_path / "no").exists()
