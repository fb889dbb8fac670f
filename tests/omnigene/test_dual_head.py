"""dual_head.py: samples without a leak, its table recomputed by hand, a run with and without the accelerator."""

import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from omnigene_fast.demo.training import IGNORED, collate
from omnigene_fast.heads import TRACKS, DualHead, ResidueHeads

from .helpers import load

script = load("dual_head")
shared, measures = load("shared"), load("measures")
TINY = ["--steps", "2", "--batch", "2", "--limit", "6", "--rank", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def tokenizer():
    return shared.byte_tokenizer()


def test_a_sample_has_its_labels_on_the_sequence_and_the_answer_behind(tokenizer):
    for track in TRACKS:
        for domain in shared.split_domains("test")[:20]:
            made = script.sample(domain, tokenizer, track)
            assert len({len(each) for each in made.values()}) == 1
            answered = [n for n, label in enumerate(made["labels"]) if label != IGNORED]
            assert tokenizer.decode([made["labels"][n] for n in answered]) == domain.tracks[track] + "<eos>"
            assert all(made["input_ids"][n] == made["labels"][n] for n in answered)
            for name, letters in TRACKS.items():
                labels = made[f"labels_{name}"]
                at = [n for n, label in enumerate(labels) if label != IGNORED]
                assert tokenizer.decode([made["input_ids"][n] for n in at]) == domain.sequence
                assert "".join(letters[labels[n]] for n in at) == domain.tracks[name]
                assert max(at) < min(answered)  # a causal model cannot have seen any label
            bare = script.sample(domain, tokenizer)
            assert bare["input_ids"] == made["input_ids"][: len(bare["input_ids"])]
            assert set(bare["labels"]) == {IGNORED}


def test_a_residue_is_one_token(tokenizer):
    class Pairs:
        unk_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [1, 2]}

    assert script.residue("A", tokenizer) == tokenizer("A")["input_ids"][0]
    with pytest.raises(ValueError, match=r"one token per amino acid, got \[1, 2\] for 'A'"):
        script.residue("A", Pairs())


def test_the_interval_is_that_of_groups():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 60, 80)
    groups = np.repeat(np.arange(80), sizes)
    values = (generator.random(len(groups)) < np.repeat(generator.random(80), sizes)).astype(float)
    mean, low, high = measures.clustered(values, groups)
    assert mean == pytest.approx(values.mean())
    draws = []
    members = [values[groups == g] for g in range(80)]
    for _ in range(3000):
        drawn = np.concatenate([members[g] for g in generator.integers(0, 80, 80)])
        draws.append(drawn.mean())
    assert (high - low) / 2 / 1.96 == pytest.approx(np.std(draws), rel=0.1)
    single = measures.clustered(values, np.arange(len(values)))  # negative control: as if residues were independent
    assert (single[2] - single[1]) / 2 / 1.96 == pytest.approx(values.std() / len(values) ** 0.5, rel=0.01)
    assert high - low > 2 * (single[2] - single[1])


@pytest.mark.parametrize("track", TRACKS)
def test_the_table_by_hand(track):
    trained, tested = shared.split_domains("train")[:60], shared.split_domains("test")[:25]
    assert not {d.superfamily for d in trained} & {d.superfamily for d in tested}
    true = "".join(d.tracks[track] for d in tested)
    sequence = "".join(d.sequence for d in tested)
    ids = np.array([TRACKS[track].index(letter) for letter in true])
    noisy = np.where(np.random.default_rng(0).random(len(ids)) < 0.4, ids, 0)
    rows = {row[""]: row for row in script.scores(track, trained, tested, {"perfect": ids, "noisy": noisy})}

    seen, of = Counter("".join(d.tracks[track] for d in trained)), defaultdict(Counter)
    for domain in trained:
        for acid, letter in zip(domain.sequence, domain.tracks[track], strict=True):
            of[acid][letter] += 1
    commonest = seen.most_common(1)[0][0]
    best = {acid: max(each, key=lambda x, each=each: (each[x], seen[x])) for acid, each in of.items()}
    lookup = [best[acid] for acid in sequence]
    right = sum(a == b for a, b in zip(lookup, true, strict=True)) / len(true)
    assert rows[f"commonest class, {commonest}"]["accuracy"] == pytest.approx(true.count(commonest) / len(true))
    assert rows["lookup by amino acid"]["accuracy"] == pytest.approx(right)
    chance = sum(seen[letter] / seen.total() for letter in true) / len(true)
    assert rows["chance: classes by their frequency"]["accuracy"] == pytest.approx(chance)
    assert rows["perfect"]["accuracy"] == rows["perfect"]["macro F1"] == 1
    assert rows["perfect"]["gain"].startswith(f"{1 - right:+.3f}")
    assert rows["noisy"]["accuracy"] == pytest.approx((noisy == ids).mean())
    each = []
    for letter in set(true):
        n = TRACKS[track].index(letter)
        precision = ((noisy == n) & (ids == n)).sum() / max(1, (noisy == n).sum())
        recall = ((noisy == n) & (ids == n)).sum() / (ids == n).sum()
        each.append(2 * precision * recall / (precision + recall) if recall else 0)
    assert rows["noisy"]["macro F1"] == pytest.approx(np.mean(each))
    # Labels of another domain: as good as its share of the commonest class, not as good as the heads.
    last = rows["the same, labels of another domain"]
    assert last["accuracy"] < rows["noisy"]["accuracy"] - 0.1
    shifted = "".join(d.tracks[track] for d in [*tested, *trained])[200:]
    matched = [TRACKS[track][n] == letter for n, letter in zip(noisy, shifted, strict=False)]
    assert last["accuracy"] == pytest.approx(sum(matched) / len(ids))


@pytest.mark.parametrize("track", TRACKS)
def test_labels_of_another_domain_are_of_another_one(track):
    assert max(len(domain.sequence) for domain in shared.domains().values()) <= script.LONGEST
    trained, [one] = shared.split_domains("train")[:60], shared.split_domains("test")[:1]
    ids = np.array([TRACKS[track].index(letter) for letter in one.tracks[track]])
    rows = {row[""]: row for row in script.scores(track, trained, [one], {"perfect": ids})}
    assert rows["perfect"]["accuracy"] == 1
    assert np.isnan([rows["perfect"]["low"], rows["perfect"]["high"]]).all()  # one superfamily: no interval
    assert rows["the same, labels of another domain"]["accuracy"] < 0.9


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("dual_head")
    torch.set_num_threads(1)
    script.main([*TINY, "--compare", "--out", str(out)])
    return out


def parts(out):
    return {part.get("title", part["kind"]): part for part in json.loads((out / "result.json").read_text())["parts"]}


def test_both_ways_train_and_predict_alike(done):
    made = parts(done)
    note = made["Training"]["note"]
    assert json.loads((done / "result.json").read_text())["faults"] == []
    first, every = re.findall(r"(\d\.\de[-+]\d\d)", note)
    assert float(first) < 1e-5
    assert float(every) < 1e-3
    assert [row[0] for row in made["Training"]["rows"]] == [row[0] for row in made["Measuring"]["rows"]]
    differing = re.search(r"Of (\S+) predictions (\d+) differ .*, (\d+) between", note)
    residues = sum(len(domain.sequence) for domain in shared.split_domains("test")[:6])
    assert int(differing[1].replace(",", "")) == 2 * residues
    assert int(differing[2]) == 0
    assert int(differing[3]) <= 1  # a tie may fall either way
    assert (done / "dual_head.png").stat().st_size > 10_000


def test_what_was_saved_gives_the_accuracy_of_the_table(done, tokenizer):
    heads = ResidueHeads.load(done / "heads.safetensors", tracks=TRACKS)
    fresh = ResidueHeads(heads.hidden_size)
    base = AutoModelForCausalLM.from_pretrained(done / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, done / "adapter").eval()
    tested = shared.split_domains("test")[:6]
    for track, title in (("3di", "3Di of 6"), ("dssp", "DSSP of 6")):
        table = next(part for name, part in parts(done).items() if name.startswith(title))
        row = next(row for row in table["rows"] if row[0] == "heads and LoRA")
        right, other = 0, 0
        for domain in tested:
            batch = collate([script.sample(domain, tokenizer)], 0)
            truth = [TRACKS[track].index(letter) for letter in domain.tracks[track]]
            right += (script.predicted(DualHead(model, heads), batch)[track] == torch.tensor(truth)).sum().item()
            other += (script.predicted(DualHead(model, fresh), batch)[track] == torch.tensor(truth)).sum().item()
        total = sum(len(domain.sequence) for domain in tested)
        assert float(row[1]) == pytest.approx(right / total, rel=1e-3)
        assert other != right  # negative control: it is these heads that give it


def test_stock_never_calls_the_accelerator(monkeypatch, tmp_path, done):
    def never(*_, **__):
        raise AssertionError("accelerated")

    monkeypatch.setattr("omnigene_fast.accelerate", never)
    small = ["--steps", "1", "--batch", "2", "--limit", "2", "--rank", "4", "--dtype", "bfloat16"]
    script.main([*small, "--stock", "--model", str(done / "base"), "--out", str(tmp_path)])
    made = parts(tmp_path)
    assert [row[0] for row in made["Training"]["rows"]] == ["stock"]
    assert made["Training"]["note"] == ""


def test_an_accelerator_that_does_nothing_is_found(monkeypatch, tmp_path, done):
    monkeypatch.setattr("omnigene_fast.accelerate", lambda model, **_: model)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RuntimeError, match="expected it accelerated, got 0 of its 8 routers and experts"):
        script.main([*TINY, "--compare", "--model", str(done / "base"), "--out", str(tmp_path)])
    assert not (tmp_path / "result.json").exists()  # the stale one is gone


@pytest.mark.parametrize("way", ["stock", "accelerated"])
def test_a_loss_that_is_no_number_is_a_fault(way, monkeypatch, tmp_path, done):
    def train(*rest, title, **more):
        run = real(*rest, title=title, **more)
        run.losses = [run.losses[0], math.nan] if title == way else run.losses
        return run

    real = script.train
    monkeypatch.setattr(script, "train", train)
    with pytest.raises(RuntimeError, match="losses: expected as many finite ones of both ways"):
        script.main([*TINY, "--compare", "--model", str(done / "base"), "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "result.json").read_text())["faults"]) == 1
    assert parts(tmp_path)["Measuring"]["rows"]  # everything is kept


def test_predictions_that_differ_are_a_fault(tmp_path):
    results = shared.Results(shared.parser("", "x").parse_args(["--out", str(tmp_path)]), "", "")
    one = {track: np.zeros(600, dtype=int) for track in TRACKS}
    other = one | {"dssp": np.eye(600, dtype=int)[5]}
    made = {"stock": one, "accelerated": other}
    same = {"stock": one, "accelerated": one}
    assert "Of 1,200 predictions 0 differ with the same weights, 1 between" in script.differences(
        results, same, made, "float32"
    )
    script.differences(results, made, made, "bfloat16")
    assert results.content["faults"] == []
    script.differences(results, made, same, "float32")
    assert len(results.content["faults"]) == 1


def test_scores_that_are_no_numbers_are_no_predictions(done, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(done / "base", dtype=torch.float32)
    heads = ResidueHeads(model.config.hidden_size)
    torch.nn.init.constant_(next(heads.parameters()), math.nan)
    batch = collate([script.sample(shared.split_domains("test")[0], tokenizer)], 0)
    with pytest.raises(RuntimeError, match="expected finite scores"):
        script.predicted(DualHead(model, heads), batch)


def test_a_checkpoint_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--model: expected a checkpoint directory"):
        script.main([*TINY, "--model", str(tmp_path), "--out", str(tmp_path / "out")])
