"""audit.py: what it prints follows from the traces that it leaves; both ways of tracing record the same."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.demo.model import BYTES, load_texts

from .helpers import load

TINY = ["--threads", "1", "--pairs", "6", "--permutations", "20"]
STAGES = ("base", "cpt", "sft")


@pytest.fixture(scope="module")
def audit():
    return load("audit")


@pytest.fixture(scope="module")
def gate():
    return load("gate_or_experts")


@pytest.fixture(scope="module")
def out(audit, tmp_path_factory):
    """What a tiny audit of the small model leaves, traced both ways."""
    path = tmp_path_factory.mktemp("audit") / "out"
    audit.main(
        [*TINY, "--compare", "--steps", "2", "--batch", "6", "--texts", "3", "--length", "96", "--out", str(path)]
    )
    return path


@pytest.fixture(scope="module")
def tables(out):
    """Title -> rows of result.json."""
    parts = json.loads((out / "result.json").read_text())["parts"]
    return {
        part["title"]: [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]]
        for part in parts
        if part["kind"] == "table"
    }


def opened(out, name, way="accelerated"):
    return omnigene_fast.open_trace(out / "traces" / way / name)


def table_of(tables, words):
    return next(rows for title, rows in tables.items() if words in title.lower())


def test_the_last_texts_of_each_family_are_audited(out):
    for stage in STAGES:
        run = opened(out, stage)
        assert run.verify() == []
        assert run.documents.groupby("task").size().to_dict() == dict.fromkeys(load_texts(1), 3)
    first = next(run.iter_documents())[1]
    text = load_texts(50)["protein"][47].encode()
    assert first.token.tolist()[:50] == [2, *(BYTES + byte for byte in text)][:50]


def decoded(samples):
    return [bytes(token - BYTES for token in sample["input_ids"] if token >= BYTES) for sample in samples]


def test_no_audited_text_is_learned(audit):
    rows = audit.audited(audit.arguments([]))
    audited = {row.text.encode() for row in rows}
    assert len(audited) == 12 * 16
    learned = audit.lessons(10**6)
    whole = decoded(learned["cpt"])
    assert whole == [text.encode() for each in load("cpt").texts().values() for text in each]
    assert not audited & set(whole)
    assert audited & {text.encode() for each in load_texts(34).values() for text in each}  # the shipped ones are not so
    asked = decoded(learned["sft"])
    assert asked == [f"{one.prompt} {one.answer}".encode() for one in load("sft").kinds("train")]
    assert not {text[:90] for text in audited} & {text[:90] for text in asked}


def test_gate_prompts_are_of_pairs_that_no_stage_learns(audit, gate):
    chosen = gate.prompts(60)
    assert len(chosen) == 120
    sequences = [each.sequence for pair in chosen for each in (pair.a, pair.b)]
    learned = "\n".join(text for each in load("cpt").texts().values() for text in each)
    learned += "\n".join(one.prompt for one in load("sft").mixture())
    assert not [one for one in sequences if one in learned]
    shipped = "\n".join(text for each in load_texts(34).values() for text in each)
    assert len([one for one in sequences if one in shipped]) > 10  # the control


def test_decomposition_and_differentiation_are_the_analysis(out, tables):
    runs = [opened(out, stage) for stage in STAGES]
    expected = analysis.decompose(*runs, permutations=0).to_dict("records")
    shown = table_of(tables, "growth")
    assert [row["stage"] for row in shown] == ["d_cpt", "d_sft"] * 2
    for row, wanted in zip(shown, expected, strict=True):
        for name in ("before", "after", "corrected", "low", "high"):
            assert float(row[name]) == pytest.approx(wanted[name], rel=1e-3)
    mean = table_of(tables, "families are routed")[-1]
    for stage, run in zip(STAGES, runs, strict=True):
        value = analysis.differentiation(run, permutations=0).iloc[-1]["corrected"]
        assert float(mean[stage].split()[0]) == pytest.approx(value, abs=6e-5)
    assert len({mean[stage] for stage in STAGES}) == 3  # training changed what was traced
    assert "<html" in (out / "report.html").read_text()[:2000]
    for name in ("stages.png", "gate.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def shares(run):
    return run.counts / run.counts.sum(-1, keepdims=True)


def divergence(a, b):
    """Mean over layers, by scipy."""
    return float(np.mean([jensenshannon(x, y) ** 2 for x, y in zip(a, b, strict=True)]))


def test_prompts_and_sequences_diverge_as_scipy_says(out, tables, gate):
    shown = {row["compared"]: row for row in table_of(tables, "does the gate") if row["layer"] == "mean"}
    prompts, sequences = opened(out, "prompts"), opened(out, "sequences")
    share, answer = shares(prompts), prompts.documents["answer"].tolist()
    yes, no = ([one for one, is_ in zip(share, answer, strict=True) if is_ == kind] for kind in gate.ANSWERS.values())
    assert (len(yes), len(no)) == (6, 6)
    expected = {
        gate.OTHER: [divergence(a, b) for a in yes for b in no],
        gate.SAME: [divergence(a, b) for each in (yes, no) for a, b in zip(each[::2], each[1::2], strict=True)],
    }
    share = shares(sequences)
    both = [divergence(a, b) for a, b in zip(share[::2], share[1::2], strict=True)]
    expected |= {gate.SEQUENCES[True]: both[:6], gate.SEQUENCES[False]: both[6:]}
    families = opened(out, "sft")
    share, task = shares(families), families.documents["task"].tolist()
    known = range(len(task))
    expected[gate.FAMILIES] = [divergence(share[a], share[b]) for a in known for b in known[:a] if task[a] != task[b]]
    for name, values in expected.items():
        assert int(shown[name]["pairs"]) == len(values), name
        assert float(shown[name]["js"]) == pytest.approx(np.mean(values), abs=6e-5), name
        kept = float(shown[name]["js"]) - float(shown[name]["floor"])
        assert float(shown[name]["corrected"].split()[0]) == pytest.approx(kept, abs=2e-4), name
    assert float(shown[gate.FAMILIES]["floor"]) > float(shown[gate.OTHER]["floor"])  # of fewer tokens


def test_sequences_are_traced_where_they_stand_in_the_prompt(out, gate):
    """The tokens are the sequences' alone, and their experts those that they have in the whole prompt."""
    chosen = gate.prompts(6)
    assert [pair.homologous for pair in chosen] == [True] * 6 + [False] * 6
    assert {pair.level for pair in chosen[:6]} == {"standard", "remote"}
    whole = {row["doc_id"]: records for row, records in opened(out, "prompts").iter_documents()}
    found = {row["doc_id"]: records for row, records in opened(out, "sequences").iter_documents()}
    assert sorted(found) == list(range(24))
    same = []
    for document, records in found.items():
        pair, prompt = chosen[document // 2], whole[document // 2]
        sequence = (pair.b if document % 2 else pair.a).sequence
        assert bytes((records.token - BYTES).astype(np.uint8)).decode() == sequence
        text = bytes(np.maximum(prompt.token[1:] - BYTES, 0).astype(np.uint8)).decode()
        assert (
            text.rstrip() == f"### Sequence 1:\n{pair.a.sequence}\n\n### Sequence 2:\n{pair.b.sequence}\n\nHomologous?"
        )
        start = 1 + (text.rindex(sequence) if document % 2 else text.index(sequence))
        same.append(np.sort(records.ids, -1) == np.sort(prompt.ids[:, start : start + len(sequence)], -1))
    assert np.concatenate([each.ravel() for each in same]).mean() > 0.999  # another batch may round a tie


def test_hooks_and_gate_record_the_same(out, tables, audit, capsys):
    shown = table_of(tables, "experts recorded")
    for row, stage in zip(shown, STAGES, strict=True):
        stock, ours = opened(out, stage, "stock"), opened(out, stage)
        picks = stock.counts.sum() // stock.top_k
        assert (row["stage"], row["token and layer"], row["other experts"]) == (stage, str(picks), "0")
        assert row["same set"] == "100.0000%"
        assert np.array_equal(stock.counts, ours.counts)
    speeds = table_of(tables, "tracing")
    assert [row["way"] for row in speeds] == ["stock", "accelerated"]
    assert float(speeds[1]["speed-up"][:-1]) > 0
    # The negative control: another checkpoint is not the same.
    shared = load("shared")
    results = shared.Results(audit.arguments(["--out", str(out)]), "", "")
    ways = {"stock": [opened(out, "base", "stock")], "accelerated": [opened(out, "sft")]}
    audit.compare(ways, {way: shared.Measured() for way in ways}, results)
    assert int(results.content["parts"][-1]["rows"][0][2]) > 100


def test_equal_checkpoints_of_texts_of_ones_own(out, audit, tmp_path, capsys):
    """Three times the same checkpoint: nothing grows. Traced by hooks; one kind has an odd number of texts."""
    data = tmp_path / "texts.jsonl"
    rows = [{"body": f"{word} {number} " * 5, "kind": word} for word in ("ACGT", "helix") for number in range(5)]
    data.write_text("\n".join(map(json.dumps, rows)))
    base = str(out / "base")
    more = ["--data", str(data), "--text-col", "body", "--label-col", "kind", "--stock", "--out", str(tmp_path / "out")]
    audit.main([*TINY, "--models", base, base, base, *more, "--pairs", "4"])
    runs = [opened(tmp_path / "out", stage, "stock") for stage in STAGES]
    assert runs[0].meta["model"] == base
    assert runs[0].documents.groupby("task").size().to_dict() == {"ACGT": 5, "helix": 5}
    assert np.array_equal(runs[0].counts, runs[2].counts)
    assert not (tmp_path / "out" / "base").exists()  # no small model was made
    grown = [line.split()[4] for line in capsys.readouterr().out.splitlines() if line.split()[1:2] == ["d_cpt"]]
    assert grown == ["0", "0"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--models", "a", "b", "c"],
            ValueError,
            "--models: expected checkpoint directories with a config.json, got a",
        ),
        (["--data", "none.jsonl"], ValueError, "data: expected a JSON-lines file"),
        (["--models", "a", "b", "c", "--model", "d"], ValueError, "--model: expected --models BASE CPT SFT"),
        (["--model", "d"], ValueError, "--model: expected --models BASE CPT SFT, a checkpoint of each stage, got d"),
        (["--texts", "17"], SystemExit, "2"),  # the others are learned
    ],
)
def test_bad_input_is_refused(audit, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        audit.main([*arguments, "--out", str(tmp_path / "out")])
