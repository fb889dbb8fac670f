import argparse
import json
from collections import Counter

import numpy as np
import pytest
import torch

import omnigene_fast
from omnigene_fast.demo.training import IGNORED
from omnigene_fast.integrations.experts import implementation, is_experts

from .helpers import load

molecules, vision, stages, shared = load("molecules"), load("vision"), load("stages"), load("shared")
multimodal = load("multimodal")
TINY = ["--steps", "1", "--limit", "3", "--batch", "3", "--length", "24", "--tokens", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return argparse.Namespace(
        model=None, out=tmp_path_factory.mktemp("vision"), seed=0, dtype="auto", batch=2, limit=3, length=24, tokens=3
    )


@pytest.fixture(scope="module")
def made(options):
    return vision.load(options)


@pytest.fixture(scope="module")
def tests():
    return molecules.split_molecules("test")[:3]


def test_captions_and_what_is_the_same_molecule():
    aspirin, again, hexane, broken = "CC(=O)OC1=CC=CC=C1C(=O)O", "OC(=O)c1ccccc1OC(C)=O", "CCCCCC", "C1CC(=O"
    found, unread = molecules.parsed([aspirin, hexane, broken, again, "C(C)(C)(C)(C)C"])
    assert unread == 2  # one that does not parse, one that cannot be sanitized
    assert [each.caption for each in found] == ["benzene, acid, ester, ether", "none"]
    known = {"CCO": "alcohol", "Nc1ccccc1": "aniline", "CC#N": "nitrile", "ClCCS": "halogen", "c1ccncc1": "pyridine"}
    for smiles, expected in known.items():
        ((molecule,), _) = molecules.parsed([smiles])
        assert set(expected.split(", ")) <= set(molecule.groups), (smiles, molecule.caption)


def test_the_data_is_split_by_molecule():
    from rdkit import Chem

    train, test = molecules.split_molecules("train"), molecules.split_molecules("test")
    assert len(train) > 150
    assert len(test) > 150
    keys = [{Chem.MolToInchiKey(Chem.MolFromSmiles(each.smiles)) for each in part} for part in (train, test)]
    assert not keys[0] & keys[1]
    assert len(train) + len(test) == len(molecules.molecules()[0])


def test_f1_and_the_best_constant_caption():
    some = [
        molecules.Molecule("a", ("benzene", "ester")),
        molecules.Molecule("b", ("ester",)),
        molecules.Molecule("c", ()),
    ]
    assert molecules.f1([each.caption for each in some], some) == 1
    assert molecules.f1(["ester, halogen", "esterester", "none"], some) == pytest.approx(2 * 1 / (2 + 3))
    assert molecules.constant_caption(some) == "ester"  # 2 of 3 named right and 1 wrong: 2 * 2 / (3 + 3)
    assert molecules.f1(["ester"] * 3, some) == pytest.approx(4 / 6)


def test_inputs_are_those_of_the_processor(made, tests):
    _, encoder = made
    samples = [encoder.sample(tests[0].question, tests[0].smiles), encoder.sample(shared.Question("Yes? ", "no", ""))]
    batch = encoder.batch(samples)
    config, ids = encoder.config, batch["input_ids"][0].tolist()
    assert ids[:2] == [encoder.tokenizer.bos_token_id, config.boi_token_id]
    assert ids[2:66] == [config.image_token_id] * 64
    assert ids[66] == config.eoi_token_id
    assert encoder.tokenizer.decode(ids[67:]) == molecules.CUE + tests[0].caption + "<eos>"
    learned = [token for token, label in zip(ids, batch["labels"][0].tolist(), strict=True) if label != IGNORED]
    assert encoder.tokenizer.decode(learned) == tests[0].caption + "<eos>"
    assert batch["mm_token_type_ids"].sum(1).tolist() == [64, 0]
    drawn = encoder.processor([molecules.image(tests[0].smiles, 128)], return_tensors="pt")
    assert drawn["num_soft_tokens_per_image"].tolist() == [64]
    assert torch.equal(batch["pixel_values"], drawn["pixel_values"])


def test_padding_on_either_side_is_the_same_and_the_image_is_seen(made, tests):
    model, encoder = made
    short, long = [encoder.prompt(shared.Question(text, "", ""), tests[0].smiles) for text in ("Say", "Say what it is")]

    def last(samples):
        with torch.no_grad():
            inputs = encoder.prompts(samples)
            return model(**inputs).logits[:, -1]

    together = last([short, long])
    assert torch.allclose(together, torch.cat([last([short]), last([long])]), atol=1e-4)
    blind = last([{**short, "smiles": tests[1].smiles}])
    assert (blind - together[:1]).abs().max() > 1e-2


def test_losses_are_those_of_the_model(made, tests):
    model, encoder = made
    samples = [encoder.sample(each.question, each.smiles) for each in tests]
    for sample, loss in zip(samples, vision.losses(model, encoder, samples), strict=True):
        with torch.no_grad():
            assert model(**encoder.batch([sample])).loss.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_an_image_processor_is_read_from_either_file(options, made, tmp_path, name):
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    given = json.loads((options.out / "base" / "preprocessor_config.json").read_text())
    (tmp_path / name).write_text(json.dumps(given if name.startswith("pre") else {"image_processor": given}))
    read = Gemma4ImageProcessorPil.from_pretrained(tmp_path)
    assert (read.patch_size, read.pooling_kernel_size, read.max_soft_tokens) == (8, 2, 70)


def test_a_checkpoint_that_cannot_see(options, tmp_path):
    blind = argparse.Namespace(**{**vars(options), "out": tmp_path})
    path = shared.checkpoint(blind)
    with pytest.raises(ValueError, match="--model: expected a checkpoint with a vision tower, got a Gemma4ForCausalLM"):
        vision.load(argparse.Namespace(**{**vars(blind), "model": path}))


def test_stages_hand_over_what_the_paper_hands_over(options, tests):
    model, encoder = vision.load(options)
    first, second, third = stages.STAGES
    towers = {name: tensor.detach().clone() for name, tensor in stages.tower_parameters(model)}
    assert any("vision_tower" in name for name in towers)
    assert any("embed_vision" in name for name in towers)
    model = stages.adapted(model, first, 0)
    adapters = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert len(adapters) == 4 * len(load("train_lora").TARGETS)
    assert not any("vision" in name for name in adapters)
    assert sum("router.proj" in name for name in adapters) == 4
    inputs = encoder.batch([encoder.sample(each.question, each.smiles) for each in tests])
    model.train()
    model(**inputs).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    stages.check_towers(model, towers)
    trained = model.get_input_embeddings().weight.detach().clone()
    model = stages.adapted(model, second, 0)
    assert torch.equal(model.get_input_embeddings().weight, trained)
    assert torch.equal(model.get_output_embeddings().weight, trained)
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {64}
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    again = stages.adapted(model, third, 0)
    assert again is model
    assert not any(p.requires_grad for name, p in model.named_parameters() if "embed_tokens" in name)
    stages.check_towers(model, towers)
    with torch.no_grad():
        next(stages.tower_parameters(model))[1].add_(1e-3)
    with pytest.raises(RuntimeError, match="expected a frozen vision tower"):
        stages.check_towers(model, towers)


def test_each_stage_has_its_share_of_images(options, made):
    _, encoder = made
    for stage, count in zip(stages.STAGES, (40, 20, 4), strict=True):
        some = stages.samples(encoder, stage, 40, options)
        assert len(some) == 40
        assert sum(each["smiles"] is not None for each in some) == count
        assert {each["smiles"] for each in some} <= {
            None,
            *(each.smiles for each in molecules.split_molecules("train")),
        }


def test_the_audit_counts_image_and_text_tokens_apart(options, made, tests):
    """Recounted from the routers' outputs, a molecule at a time."""
    model, encoder = made
    vision.audit(model, encoder, tests, options, "test")
    run = omnigene_fast.open_trace(options.out / "trace_test")
    assert Counter(run.documents["kind"]) == {"image": 3, "text": 3, "SMILES": 3}
    found: list[torch.Tensor] = []
    routers = [layer.router for layer in model.model.language_model.layers]
    hooks = [router.register_forward_hook(lambda _, __, out: found.append(out[2])) for router in routers]
    for number, each in enumerate(tests):
        inputs = encoder.batch([encoder.sample(each.question, each.smiles)])
        found.clear()
        with torch.no_grad():
            model(**inputs, use_cache=False)
        image = inputs["input_ids"][0] == encoder.config.image_token_id
        for kind, of in (("image", image), ("text", ~image)):
            row = vision.KINDS.index(kind) * len(tests) + number
            counts = [np.bincount(index[of].flatten().numpy(), minlength=run.num_experts) for index in found]
            assert np.array_equal(run.counts[row], counts), kind
            tokens = run.tokens(0, f"doc_id = {row}").df().sort_values("pos")["token_id"]
            assert tokens.tolist() == inputs["input_ids"][0][of].tolist()
    for hook in hooks:
        hook.remove()
    assert not np.array_equal(run.counts[0], run.counts[3])


def test_without_rdkit_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None if name == "rdkit" else name)
    with pytest.raises(ImportError, match="rdkit is not installed; install it with: pip install rdkit"):
        multimodal.main([*TINY, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_stock_never_accelerates(monkeypatch, tmp_path):
    monkeypatch.setattr(omnigene_fast, "accelerate", lambda *_, **__: pytest.fail("accelerated"))
    monkeypatch.setattr(stages, "STAGES", stages.STAGES[1:2])
    multimodal.main(["--stock", *TINY, "--out", str(tmp_path)])
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    training = next(part for part in parts if part["title"] == "The three stages")
    assert [row[training["columns"].index("way")] for row in training["rows"]] == ["stock"]


def compared(folder, *given):
    """The rows of the comparison by stage, the routing's, and the pictures' names, after --compare in this process."""
    multimodal.main(["--compare", *TINY, *given, "--out", str(folder)])
    parts = json.loads((folder / "result.json").read_text())["parts"]
    found = {part.get("title") or part["file"]: part for part in parts}

    def rows(title):
        return [dict(zip(found[title]["columns"], row, strict=True)) for row in found[title]["rows"]]

    return {row["stage"]: row for row in rows("Stock and accelerated")}, rows, set(found)


def test_both_ways_side_by_side(monkeypatch, tmp_path):
    """Every stage begins in both ways with the same weights, and goes on from what the accelerated training left."""
    begun, ended = {}, {}
    train = multimodal.train

    def watched(model, *args, title, **kwargs):
        begun[title] = stages.trained(model)
        run = train(model, *args, title=title, **kwargs)
        ended[title] = stages.trained(model)
        ways = {implementation(module) for module in model.modules() if is_experts(module)}
        assert (ways == {"omnigene_fast"}) == title.startswith("accelerated")
        return run

    monkeypatch.setattr(multimodal, "train", watched)
    apart, rows, parts = compared(tmp_path, "--steps", "6")
    assert list(apart) == ["before", *(stage.name for stage in stages.STAGES)]
    for name, row in apart.items():
        assert row["homology answers equal"] == row["captions equal"] == "3 of 3"
        assert float(row["apart"]) < 1e-4 < float(row["margins up to"])
        if name != "before":
            assert float(row["losses of ten steps"]) <= 1e-5
            assert row["losses of ten steps"] == row["all losses"]
            same(begun[f"stock, {name}"], begun[f"accelerated, {name}"])
            assert any(
                not torch.equal(ended[f"stock, {name}"][key], value) for key, value in begun[f"stock, {name}"].items()
            )
    second, third = (f"accelerated, {stage.name}" for stage in stages.STAGES[1:])
    same(begun[third], {name: value for name, value in ended[second].items() if name in begun[third]})
    losses = {(row["stage"], row["way"]): (row["first loss"], row["last loss"]) for row in rows("The three stages")}
    assert len(losses) == 6
    assert all(first != last for first, last in losses.values())
    assert {row["tokens"] for row in rows("Routing of image and text tokens")} >= {"image and text"}
    for name in ("routing.png", "molecules.png"):
        assert name in parts
        assert (tmp_path / name).stat().st_size > 5000


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_experts_in_one_way_show_in_the_comparison(monkeypatch, tmp_path):
    switch = shared.switch

    def changed(model, way):
        """The way's model; every second expert of one layer is twice as large in the accelerated one."""
        model = switch(model, way)
        (experts,) = (p for name, p in model.named_parameters() if name.endswith("layers.3.experts.down_proj"))
        with torch.no_grad():
            kept.setdefault("experts", experts.clone())
            experts.copy_(kept["experts"])
            experts[::2] *= 2 if way == shared.ACCELERATED else 1
        return model

    kept: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(shared, "switch", changed)
    monkeypatch.setattr(stages, "STAGES", stages.STAGES[:1])
    apart, _, _ = compared(tmp_path, "--steps", "2")
    (stage,) = stages.STAGES
    assert float(apart[stage.name]["losses of ten steps"]) > 1e-5
    assert float(apart[stage.name]["apart"]) > 1e-4
