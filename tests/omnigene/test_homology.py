"""homology.py and alignment.py: the split, the aligners' figures, one prefill against generate, both ways equal."""

import json
import math
import random
import shutil

import pytest
import torch
from scipy.stats import mannwhitneyu

from .helpers import load

homology, alignment, shared = load("homology"), load("alignment"), load("shared")
answers, measures = load("answers"), load("measures")

# README of the data, all 800 pairs: AUC of standard and remote pairs.
REFERENCE = {
    "MMseqs2 -s 7.5": (1.000, 0.554),
    "DIAMOND --ultra-sensitive --masking 0": (1.000, 0.555),
    "DIAMOND, default": (0.905, 0.500),
}


def parts(folder):
    """The tables of result.json by the start of their title: rows as dicts."""
    content = json.loads((folder / "result.json").read_text())
    tables = [part for part in content["parts"] if part["kind"] == "table"]
    return {part["title"]: [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]] for part in tables}, {
        part["title"]: part["note"] for part in tables
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint with its tokenizer."""
    return shared.checkpoint(homology.arguments(["--out", str(tmp_path_factory.mktemp("base"))]))


def test_no_superfamily_is_in_training_and_in_test():
    train, test = (shared.split_pairs(part) for part in ("train", "test"))
    seen, unseen = ({domain.superfamily for pair in part for domain in (pair.a, pair.b)} for part in (train, test))
    assert len(train) > 300
    assert len(test) > 300
    assert not seen & unseen
    names = [domain.name for pair in shared.pairs() for domain in (pair.a, pair.b)]
    assert len(set(names)) == len(names)  # what homology.Scores and the unit of the intervals rely on


def test_questions_are_the_pairs():
    asked, pairs = homology.questions("test"), shared.split_pairs("test")
    for question, pair in zip(asked, pairs, strict=True):
        assert question.answer == ("yes" if pair.a.superfamily == pair.b.superfamily else "no")
        assert question.group == pair.level
        _, first, second = question.prompt.split("### Sequence ")
        assert first == f"1:\n{pair.a.sequence}\n\n"
        assert second == f"2:\n{pair.b.sequence}\n\nHomologous? "
    split = [homology.questions("test", level) for level in homology.LEVELS]
    assert sorted(map(str, split[0] + split[1])) == sorted(map(str, asked))
    assert {question.group for question in split[1]} == {"remote"}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_limited_pairs_are_balanced(count):
    kept = homology.limited(shared.split_pairs("test"), count)
    for level in homology.LEVELS:
        labels = [pair.homologous for pair in kept if pair.level == level]
        assert len(labels) == count
        assert 0 <= 2 * sum(labels) - count <= 1


@pytest.mark.parametrize("method", ["mmseqs2", "diamond"])
def test_aligners_reproduce_the_table_of_the_data(method):
    """And pairs whose second domains are exchanged, of other superfamilies then, have next to no hits."""
    pairs = shared.pairs()
    for name, command in alignment.COMMANDS[method].items():
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        values, seconds = alignment.aligned(command, pairs, 1)
        assert seconds > 0
        scores = homology.named(pairs, values)
        for level, expected in zip(homology.LEVELS, REFERENCE[name], strict=True):
            positive, negative = homology.sides(pairs, scores, level)
            area = mannwhitneyu(positive, negative).statistic / len(positive) / len(negative)
            assert area == pytest.approx(expected, abs=0.01)
            row = next(row for row in homology.table(pairs, name, scores, 0, "hit", 1.0) if row["level"] == level)
            assert row["auc"] == pytest.approx(area, abs=1e-12)
            assert row["accuracy"] == sum([s > 0 for s in positive] + [s == 0 for s in negative]) / 360
    if method == "diamond":
        wrong = [
            shared.Pair(p.level, p.homologous, p.a, q.b) for p, q in zip(pairs, pairs[1:] + pairs[:1], strict=True)
        ]
        assert sum(score > 0 for score in alignment.aligned(command, wrong, 1)[0]) < 5


def test_a_missing_program_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^mmseqs is not on the PATH; .*apt-get install mmseqs2; .*--methods"):
        homology.main(["--out", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match=r"^diamond is not on the PATH; .*apt-get install diamond-aligner; .*--meth"):
        homology.main(["--methods", "model", "diamond", "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
    assert alignment.required("model") == {}


def test_a_failing_program_says_why():
    command = ["diamond", "blastp", "--no-such-option"]
    if shutil.which("diamond") is None:
        pytest.skip("diamond is not installed")
    with pytest.raises(RuntimeError, match=r"diamond ended with status 1: .*no-such-option"):
        alignment.aligned(command, shared.pairs()[:2], 1)


def test_threshold_is_the_best_of_all():
    source = random.Random(0)
    for _ in range(30):
        scores = [source.choice([0.0, 0.0, 1.0, 2.5, 3.0, 7.0]) for _ in range(20)]
        labels = [source.random() < 0.2 + 0.08 * score for score in scores]

        def right(cut, scores=scores, labels=labels):
            return sum((score > cut) == label for score, label in zip(scores, labels, strict=True))

        found = alignment.threshold(scores, labels)
        assert right(found) == max(right(cut / 10) for cut in range(-10, 90))
        assert found not in scores
    assert alignment.threshold([1.0, 2.0], [True, True]) == -math.inf
    assert alignment.threshold([1.0, 2.0], [False, True]) == 1.5


def test_intervals_of_a_perfect_separation():
    """Newcombe's interval solves its own equation, and DeLong's takes over where scores overlap."""
    low = measures.auc([3.0] * 96, [1.0] * 80)["auc low"]
    size = 88
    variance = low * (1 - low) / (96 * 80) * (1 + (size - 1) * ((1 - low) / (2 - low) + low / (1 + low)))
    assert (1 - low) / math.sqrt(variance) == pytest.approx(1.96, rel=1e-6)
    assert measures.auc([1.0] * 96, [3.0] * 80) == pytest.approx({"auc": 0.0, "auc low": 0.0, "auc high": 1 - low})
    assert math.isnan(measures.auc([1.0] * 9, [1.0] * 8)["auc low"])
    assert 0 < measures.auc([1.0, 3.0, 4.0], [0.0, 2.0, 1.5])["auc low"] < 1


@pytest.fixture(scope="module")
def esm(tmp_path_factory):
    """A tiny random ESM-2 checkpoint."""
    from transformers import EsmConfig, EsmModel, EsmTokenizer

    folder = tmp_path_factory.mktemp("esm")
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(letters))
    EsmTokenizer(folder / "vocab.txt").save_pretrained(folder)
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(letters),
        mask_token_id=len(letters) - 1,
        pad_token_id=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        position_embedding_type="rotary",
    )
    EsmModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_esm_takes_the_mean_over_residues_alone(esm):
    model, tokenizer = alignment.load_esm(esm)
    sequences = ["MKV", "ACDEFGHIKLMNPQRSTVWY"]
    batched = alignment.embedded(model, tokenizer, sequences)
    for row, sequence in zip(batched, sequences, strict=True):
        ids = torch.tensor([[0, *tokenizer.convert_tokens_to_ids(list(sequence)), 2]])
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        assert len(hidden) == len(sequence) + 2
        torch.testing.assert_close(row, hidden[1:-1].mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(row, hidden.mean(0), rtol=1e-4, atol=1e-5)  # with <cls> and <eos>
    pair = shared.pairs()[0]
    same = shared.Pair("standard", True, pair.a, pair.a)
    (one, other), _ = alignment.similar((model, tokenizer), [same, pair], 2)
    assert one == pytest.approx(1, abs=1e-6)
    assert other < 1 - 1e-5


def test_not_an_esm_checkpoint(base, tmp_path):
    for path in (base, tmp_path):
        with pytest.raises(ValueError, match=r"^--esm: expected the directory of an ESM-2 checkpoint"):
            alignment.load_esm(path)


def test_both_ways_from_training_to_answers(base, esm, tmp_path):
    """Losses and answers of the two ways agree; the table's rows are those of the pairs; ESM-2 has its own."""
    arguments = ["--compare", "--steps", "3", "--limit", "2", "--batch", "2", "--methods", "model", "--esm", str(esm)]
    homology.main([*arguments, "--model", str(base), "--lr", "2e-3", "--out", str(tmp_path)])
    tables, notes = parts(tmp_path)
    training = tables["Training on the answers"]
    assert [row["way"] for row in training] == ["stock", "accelerated"]
    assert "x" in training[1]["speed-up"]
    apart = notes["Training on the answers"].split("differ by at most ")[1].split(" ")[0]
    assert float(apart) < 1e-5
    assert notes["4 questions, one prefill each"].startswith("Answers equal: 4 of 4;")
    assert float(notes["4 questions, one prefill each"].split("at most ")[1].rstrip(".")) < 1e-4
    rows = tables["Homology, 4 test pairs of 6 superfamilies"]
    assert [row["method"] for row in rows] == ["model", "model", "ESM-2, cosine", "ESM-2, cosine"]
    assert {row["n"] for row in rows} == {"2"}
    assert (tmp_path / "homology.png").stat().st_size > 1000


def test_training_teaches_and_merging_keeps_it(base, tmp_path, monkeypatch):
    """The merged model answers as the one with adapters did; the lesson, "no" throughout, is learned."""
    from peft.tuners.lora import LoraModel

    options = homology.arguments(["--model", str(base), "--steps", "25", "--lr", "1e-2", "--out", str(tmp_path)])
    lesson = [shared.Question(f"{letter}? ", "no", "") for letter in "abcdefgh"]
    before, _ = shared.load(options)
    tokenizer = shared.load_tokenizer(base)
    inputs = answers.prompt_batches(tokenizer, lesson, 8, torch.device("cpu"))[0][1]
    first = answers.first_tokens(tokenizer, homology.ANSWERS)
    seen = []
    merge = LoraModel.merge_and_unload

    def watched(self, *args, **kwargs):
        self.model.eval()
        seen.append(answers.margins(self.model, inputs, first))
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "merge_and_unload", watched)
    model, _ = answers.tuned(options, lesson, shared.Results(options, "", ""))
    after = answers.margins(model, inputs, first)
    torch.testing.assert_close(after, seen[0], rtol=1e-3, atol=1e-3)
    assert (after < -1).all()
    assert (answers.margins(before, inputs, first).abs() < 1).all()
    assert all(text.startswith("no") for text in answers.generated(model, tokenizer, inputs, 3))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_mistake_is_one_sentence(tmp_path):
    """As the end of the script, and nothing is made."""
    expected = "homology: --limit: expected at least 2 pairs, one homologous and one not, got 1."
    with pytest.raises(SystemExit) as raised:
        shared.script("homology", lambda: homology.main(["--limit", "1", "--out", str(tmp_path)]))
    assert raised.value.code == expected
    assert not list(tmp_path.iterdir())
