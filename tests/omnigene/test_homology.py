"""homology.py and alignment.py: the split, the aligners' figures, one prefill against generate, both ways equal."""

import json
import math
import random
import re
import shutil

import pytest
import torch
from scipy.stats import mannwhitneyu

from omnigene_fast.demo.training import IGNORED, Run

from .helpers import load

homology, alignment, shared = load("homology"), load("alignment"), load("shared")
answers, measures, prompts = load("answers"), load("measures"), load("prompts")

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


def words_tokenizer():
    """Whole words with the space before them as one token, as SentencePiece makes them: "▁yes", "▁no"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [("<pad>", 0.0), ("<eos>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(word, -1.0) for word in ("▁yes", "▁no", "▁none", "yes", "▁true", "▁false")]
    vocabulary += [(chr(code), -10.0) for code in (10, *range(33, 127), 0x2581)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )


TOKENIZERS = {"bytes": shared.byte_tokenizer(), "words": words_tokenizer()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def test_candidates_are_whole_words_where_the_tokenizer_has_them():
    prompt = homology.questions("test")[0].prompt
    assert not prompt[-1].isspace()
    for name, first in (("words", ["▁yes", "▁no"]), ("bytes", ["y", "n"])):
        tokenizer = TOKENIZERS[name]
        prefix, found = prompts.candidates(tokenizer, prompt, homology.ANSWERS)
        assert tokenizer.convert_ids_to_tokens(found) == first
        assert prefix[0] == tokenizer.bos_token_id
        assert prompts.decoded(tokenizer, prefix) == prompt + " " * (name == "bytes")
        for word, token in zip(homology.ANSWERS, found, strict=True):
            whole = prompts.token_ids(tokenizer, f"{prompt} {word}")
            assert whole[: len(prefix) + 1] == [*prefix, token]
    # A template may end in a new line, behind which no space comes.
    _, found = prompts.candidates(TOKENIZERS["words"], "Related?\n", homology.ANSWERS)
    assert TOKENIZERS["words"].convert_ids_to_tokens(found) == ["yes", "n"]


def test_between_prompt_and_answer_is_one_white_space():
    expected = {"a?": "a? yes", "a? ": "a? yes", "a?\n": "a?\nyes", "": "yes"}
    assert {prompt: prompts.text(prompt, "yes") for prompt in expected} == expected


def test_no_answer_begins_as_another():
    for pair in (("no", "now"), ("no", "no")):
        with pytest.raises(ValueError, match=rf"^answers: expected none that begins .*got 'no', '{pair[1]}'"):
            prompts.candidates(TOKENIZERS["bytes"], "?", pair)
    assert prompts.candidates(TOKENIZERS["words"], "?", ("no", "none"))
    prefix, first = prompts.candidates(TOKENIZERS["bytes"], "?", ("not so", "nobody"))
    assert prompts.decoded(TOKENIZERS["bytes"], prefix) == "? no"
    assert prompts.decoded(TOKENIZERS["bytes"], first) == "tb"


def test_training_learns_what_the_scores_look_at(tokenizer, tmp_path):
    """The answer from its space on, as train_lora does with sft.py's rows."""
    import train_lora

    asked = homology.questions("train")[:3]
    rows = [{"prompt": each.prompt, "response": f" {each.answer}"} for each in asked]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--answer-only", "--length", "9999"]
    expected = train_lora.read_samples(train_lora.arguments(arguments), tokenizer)
    assert [prompts.sample(tokenizer, each) for each in asked] == expected
    for question, sample in zip(asked, expected, strict=True):
        learned = [token for token in sample["labels"] if token != IGNORED]
        assert prompts.decoded(tokenizer, learned) == f" {question.answer}"
        assert learned[-1] == tokenizer.eos_token_id
        prefix, first = prompts.candidates(tokenizer, question.prompt, homology.ANSWERS)
        right = first[homology.ANSWERS.index(question.answer)]
        assert sample["input_ids"][len(prefix)] == sample["labels"][len(prefix)] == right


def test_a_word_is_said_if_it_is_whole():
    expected = {"no": "no", " no\n": "no", "no, it": "no", "yes": "yes", "": None, "x no": None}
    expected |= dict.fromkeys(("not", "none", "now", "yesterday", "No", "no1"))
    assert {string: prompts.said(string, homology.ANSWERS) for string in expected} == expected
    assert prompts.said("Non-Homologous.", ("Homologous", "Non-Homologous")) == "Non-Homologous"


class Faults(list):
    """Results that keep faults alone."""

    fault = list.append


@pytest.mark.parametrize(
    ("stock", "ours", "exact", "said", "faults"),
    [
        ([1.0, -2.0, 3e-6], [1.0, -2.0, 2e-6], True, "equal: 3 of 3; margins up to 2 .* 1.0e-06.* decide: 0\\.", ""),
        ([1.0, -2.0, 3e-6], [1.0, -2.0, -2e-6], True, "equal: 2 of 3; .* 5.0e-06.* decide: 1\\.", "1 of 3 answers"),
        ([1.0, -2.0, 3e-6], [1.0, -2.0, -2e-6], False, "equal: 2 of 3; .* decide: 1\\.", ""),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], False, "equal: 3 of 3; .* decide: 2\\.", ""),
        ([1.0, math.nan], [1.0, math.nan], False, "differ by at most nan", "1 of 2 margins of the stock .* not finite"),
        ([1.0, 2.0], [1.0, math.inf], False, "", "1 of 2 margins of the accelerated .* not finite"),
    ],
)
def test_what_must_agree_is_a_fault_otherwise(stock, ours, exact, said, faults):
    found, results = {"stock": torch.tensor(stock), "accelerated": torch.tensor(ours)}, Faults()
    assert re.search(said, answers.agreement(found, exact, results))
    assert re.search(faults, " ".join(results)) if faults else not results


def test_generate_is_held_against_the_prefill(base, tmp_path, tokenizer, monkeypatch):
    """For every question, though an untrained model says no word; other logits are a fault."""
    options = homology.arguments(["--model", str(base), "--stock", "--batch", "2", "--out", str(tmp_path)])
    model, _ = shared.load(options)
    asked = [shared.Question(f"{letter * 9}?", "yes", "") for letter in "abc"]
    results = shared.Results(options, "", "")
    found, _ = answers.asked(model, tokenizer, asked, homology.ANSWERS, options, results)
    for question, value in zip(asked, found, strict=True):
        prefix, (yes, no) = prompts.candidates(tokenizer, question.prompt, homology.ANSWERS)
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1]
        assert value == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-5)
    results.save()
    tables, notes = parts(tmp_path)
    row = tables["One prefill against generate"][1]
    assert row["larger logit alike"] == "3 of 3"
    assert float(row["margins apart"]) < 1e-5
    assert (row["valid"], row["same answer"]) == ("0 of 3", "0 of 0")
    assert notes["One prefill against generate"].endswith("No generated text is valid, so that only logits count.")

    def other(*arguments):
        texts, logits = generated(*arguments)
        return [f"{text[:10]} none" for text in texts[:-1]] + [f"{texts[-1][:10]} no"], -logits

    generated = answers.generated
    monkeypatch.setattr(answers, "generated", other)
    answers.asked(model, tokenizer, asked, homology.ANSWERS, options, results)
    with pytest.raises(RuntimeError, match=r"generate: 3 of 3 margins are not finite, or not those"):
        results.save()
    assert parts(tmp_path)[0]["One prefill against generate"][1]["valid"] == "2 of 3"  # the last of each batch


def test_the_accelerated_model_is_the_one_returned(base, tmp_path, monkeypatch):
    """Though it was trained first, and one model is in memory at a time."""
    order = []

    def train(model, samples, plan, *, pad, title):
        order.append(title)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.requires_grad and "embed_tokens" in name:
                    tensor.add_(1 if "accelerated" in title else 2)
        return Run([1.0], 1, 1.0)

    monkeypatch.setattr("omnigene_fast.demo.training.train", train)
    arguments = ["--model", str(base), "--compare", "--steps", "1", "--out", str(tmp_path)]
    options = homology.arguments(arguments)
    before = shared.load(options)[0].get_input_embeddings().weight
    results = shared.Results(options, "", "")
    model, _ = answers.tuned(options, [shared.Question("?", "no", "")], results)
    assert order == ["training, accelerated", "training, stock"]
    torch.testing.assert_close(model.get_input_embeddings().weight, before + 1)
    results.save()
    assert [row["way"] for row in parts(tmp_path)[0]["Training on the answers"]] == ["stock", "accelerated"]


@pytest.mark.parametrize("steps", ["0", "1"])
def test_an_accelerator_that_does_nothing_cannot_pass(base, tmp_path, monkeypatch, steps):
    monkeypatch.setattr("omnigene_fast.accelerate", lambda model, **_: model)
    arguments = ["--model", str(base), "--compare", "--steps", steps, "--limit", "2", "--methods", "model"]
    with pytest.raises(RuntimeError, match=r"^model: expected it accelerated, got 0 of"):
        homology.main([*arguments, "--out", str(tmp_path)])
    assert not (tmp_path / "result.json").exists()


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
        assert second == f"2:\n{pair.b.sequence}\n\nHomologous?"
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
    assert notes["Training on the answers"].startswith("4 questions, 3 steps of 2;")  # --limit is for both parts
    assert notes["4 questions, one prefill each"].startswith("Answers equal: 4 of 4;")
    assert float(notes["4 questions, one prefill each"].split("at most ")[1].split(". ")[0]) < 1e-4
    generate = tables["One prefill against generate"][1]
    assert generate["larger logit alike"] == "4 of 4"
    assert float(generate["margins apart"]) < 1e-4
    rows = tables["Homology, 4 test pairs of 6 superfamilies"]
    assert [row["method"] for row in rows] == ["model", "model", "ESM-2, cosine", "ESM-2, cosine"]
    assert {row["n"] for row in rows} == {"2"}
    assert (tmp_path / "homology.png").stat().st_size > 1000


def test_training_teaches_and_merging_keeps_it(base, tmp_path, monkeypatch):
    """The merged model answers as the one with adapters did; the lesson, "no" throughout, is learned."""
    from peft.tuners.lora import LoraModel

    options = homology.arguments(["--model", str(base), "--steps", "25", "--lr", "1e-2", "--out", str(tmp_path)])
    lesson = [shared.Question(f"{letter}?", "no", "") for letter in "abcdefgh"]
    before, _ = shared.load(options)
    tokenizer = shared.load_tokenizer(base)
    _, inputs, first = prompts.prompt_batches(tokenizer, lesson, homology.ANSWERS, 8, torch.device("cpu"))[0]
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
    texts, logits = answers.generated(model, tokenizer, inputs, 3)
    assert all(text[1:] == "? no" for text in texts)
    torch.testing.assert_close(answers.margin(logits, first), after, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_mistake_is_one_sentence(tmp_path):
    """As the end of the script, and nothing is made."""
    expected = "homology: --limit: expected at least 2 pairs, one homologous and one not, got 1."
    with pytest.raises(SystemExit) as raised:
        shared.script("homology", lambda: homology.main(["--limit", "1", "--out", str(tmp_path)]))
    assert raised.value.code == expected
    assert not list(tmp_path.iterdir())
