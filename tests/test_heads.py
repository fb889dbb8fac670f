"""Heads on the last hidden state: the loss against plain float64, one hidden state kept, causality, wrappers, files."""

import copy
import gc
import json
import math

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import omnigene_fast
from omnigene_fast.demo.training import Plan, collate, train
from omnigene_fast.heads import IGNORED, TRACKS, DualHead, ResidueHeads, last_hidden_state

from . import helpers
from .helpers import HIDDEN, VOCAB, moe_layers, relative_error, tokens
from .test_training import MODULES

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MODELS = {"causal": helpers.gemma4, "conditional": helpers.gemma4_conditional}
TOWERS = r".*(vision_tower|embed_vision).*"  # not of the language model
B, S = 2, 24


def labels(seed=0, B=B, S=S):
    """Classes of both tracks, on other positions of each, and none on a third of all."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for track, letters in TRACKS.items():
        ids = torch.randint(len(letters), (B, S), generator=generator)
        ids[torch.rand(B, S, generator=generator) < 0.2] = IGNORED
        ids[:, : S // 3] = IGNORED
        made[track] = ids
    return made


def batch(seed=0, B=B, S=S):
    made = {"input_ids": tokens(B, S, seed), "labels": tokens(B, S, seed)}
    return made | {f"labels_{track}": ids for track, ids in labels(seed, B, S).items()}


def heads(dtype=F32, seed=0, **options):
    torch.manual_seed(seed)
    return ResidueHeads(HIDDEN, **options).to(dtype)


def adapted(model, seed=1):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=MODULES, exclude_modules=TOWERS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def dual(*, accelerated=False, checkpointing=False, lora=True, dtype=F32):
    model = helpers.gemma4(dtype)
    model.set_experts_implementation("eager")
    model = adapted(model) if lora else model
    if accelerated:
        omnigene_fast.accelerate(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return DualHead(model, heads(dtype)).train()


def plain_loss(hidden, given, module):
    """The heads' loss in float64, residue by residue."""
    total = 0.0
    for track, ids in given.items():
        weight = module.linears[track].weight.double()
        bias = module.linears[track].bias.double()
        each = []
        for row, position in (ids != IGNORED).nonzero().tolist():
            logits = weight @ hidden[row, position].double() + bias
            each.append(logits.logsumexp(0) - logits[ids[row, position]])
        total = total + torch.stack(each).mean() / len(given)
    return total


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (F32, 1e-6), (BF16, 1e-6)])
def test_loss_is_that_of_a_plain_computation(dtype, bound):
    model, module, given = helpers.gemma4(dtype), heads(F64 if dtype == F64 else F32), labels()
    model.set_experts_implementation("eager")
    with last_hidden_state(model) as hidden:
        out = model(tokens(B, S), output_hidden_states=True)
    assert torch.equal(hidden(), out.hidden_states[-1])
    loss = module.loss(hidden(), given)
    truth = plain_loss(out.hidden_states[-1], given, module)
    assert loss.dtype == (F64 if dtype == F64 else F32)
    assert relative_error(loss.detach(), truth.detach()) < bound
    for shift in (1, -1):  # negative control: the neighbour's hidden state
        assert relative_error(module.loss(hidden().roll(shift, 1), given).detach(), truth.detach()) > 1e-3


def test_gradients_reach_trunk_and_heads_and_are_those_of_the_plain_loss():
    ours, plain = dual(dtype=F64), dual(dtype=F64)
    given = batch()
    out = ours(**given)
    out["loss"].backward()
    reference = plain.model(given["input_ids"], labels=given["labels"], output_hidden_states=True)
    residue = plain_loss(reference.hidden_states[-1], labels(), plain.heads)
    (0.5 * reference.loss + 0.5 * residue).backward()
    assert out["language_loss"].item() == pytest.approx(reference.loss.item(), rel=1e-12)
    assert out["residue_loss"].item() == pytest.approx(residue.item(), rel=1e-12)
    assert out["loss"].item() == pytest.approx((out["language_loss"] + out["residue_loss"]).item() / 2, rel=1e-12)
    expected = dict(plain.named_parameters())
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert any("heads" in name for name in trained)
    assert any("layers.0" in name for name in trained)
    for name, gradient in trained.items():
        assert relative_error(gradient, expected[name].grad) < 1e-10, name


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_weight_is_that_of_the_heads(weight):
    module = dual()
    module.weight = weight
    out = module(**batch())
    expected = (1 - weight) * out["language_loss"] + weight * out["residue_loss"]
    assert relative_error(out["loss"].detach(), expected) < 1e-6


def test_a_track_without_labels_has_gradients_of_zero():
    """DDP waits for the gradient of every weight."""
    module, given = heads(), labels()
    hidden = torch.randn(B, S, HIDDEN, requires_grad=True)
    alone = ResidueHeads(HIDDEN, {"dssp": TRACKS["dssp"]})
    alone.linears["dssp"].load_state_dict(module.linears["dssp"].state_dict())
    loss = module.loss(hidden, given | {"3di": torch.full((B, S), IGNORED)})
    loss.backward()
    assert relative_error(loss.detach(), alone.loss(hidden, {"dssp": given["dssp"]}).detach() / 2) < 1e-6
    assert all(not p.grad.any() for p in module.linears["3di"].parameters())
    assert all(p.grad.any() for p in module.linears["dssp"].parameters())
    nothing = module.loss(hidden, {track: torch.full((B, S), IGNORED) for track in TRACKS})
    assert nothing.item() == 0
    nothing.backward()


def test_only_labelled_positions_go_through_the_linears(monkeypatch):
    module, given, seen = heads(), labels(), []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(tuple(x.shape)) or x @ self.weight.T)
    module.loss(torch.randn(B, S, HIDDEN), given)
    labelled = int(((given["3di"] != IGNORED) | (given["dssp"] != IGNORED)).sum())
    assert seen == [(labelled, HIDDEN)] * 2
    assert labelled < B * S


def test_float32_under_autocast():
    module, hidden, given = heads(), torch.randn(B, S, HIDDEN).to(BF16), labels()
    with torch.autocast("cpu", BF16):
        assert not torch.equal(nn.functional.linear(hidden, module.linears["3di"].weight).float(), hidden.float())
        loss, logits = module.loss(hidden, given), module(hidden)
    assert loss.dtype == logits["3di"].dtype == F32
    assert relative_error(loss.detach(), plain_loss(hidden, given, module).detach()) < 1e-6


# --- the hidden state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wrapper", ["bare", "peft", "accelerated", "checkpointed", "all"])
@pytest.mark.parametrize("keep", [0, 1])
def test_hidden_state_of_any_model(kind, wrapper, keep):
    model = MODELS[kind]()
    with torch.no_grad():
        expected = (adapted(copy.deepcopy(model)) if wrapper in ("peft", "all") else model)(
            tokens(B, S), output_hidden_states=True
        ).hidden_states[-1]
    if wrapper in ("peft", "all"):
        model = adapted(model)
    if wrapper in ("accelerated", "all"):
        model = omnigene_fast.accelerate(model)
    if wrapper in ("checkpointed", "all"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with last_hidden_state(model) as hidden:
        model(tokens(B, S), logits_to_keep=keep, use_cache=False)
    assert hidden().requires_grad
    assert relative_error(hidden().detach(), expected) < 1e-5
    hidden().sum().backward()  # with checkpointing the layers run again, without the hook
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__ == "Gemma4TextModel")


def hidden_states_alive():
    return sum(isinstance(one, torch.Tensor) and one.shape == (B, S, HIDDEN) for one in gc.get_objects())


def test_one_hidden_state_is_kept():
    model, before = helpers.gemma4(), hidden_states_alive()
    with torch.no_grad(), last_hidden_state(model) as hidden:
        for seed in range(3):
            out = model(tokens(B, S, seed), logits_to_keep=1)
            assert hidden_states_alive() == before + 1
    last = hidden()
    del hidden, out
    assert hidden_states_alive() == before + 1
    del last
    assert hidden_states_alive() == before
    with torch.no_grad():
        out = model(tokens(B, S), output_hidden_states=True)
    assert hidden_states_alive() == before + 4  # what is not done: embeddings and three layers
    assert len(out.hidden_states) == 4


def test_the_dual_head_lets_go_of_it():
    module, before = dual(), hidden_states_alive()
    out = module(**batch())
    out["loss"].backward()
    assert hidden_states_alive() == before


def test_a_fused_loss_that_never_calls_the_output_layer(monkeypatch):
    """As liger-kernel patches the class: the loss from the hidden state and the output layer's weight."""
    module, given = dual(), batch()
    expected = module(**given)

    def fused(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        cap = self.config.final_logit_softcapping
        logits = hidden @ self.lm_head.weight.T
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss})()

    def called(*_):
        raise AssertionError("the output layer was called")

    monkeypatch.setattr(type(module.model.get_base_model()), "forward", fused)
    module.model.get_output_embeddings().register_forward_hook(called)
    out = module(**given)
    for part in expected:
        assert relative_error(out[part].detach(), expected[part].detach()) < 1e-6, part


def test_a_compiled_model_that_ran_before():
    """The hook comes after the graph: it must be seen all the same, with the values of each call."""
    model = omnigene_fast.accelerate(helpers.gemma4())
    expected = [DualHead(model, heads())(**batch(seed))["loss"].item() for seed in range(2)]
    compiled = torch.compile(model, backend="eager")
    module = DualHead(compiled, heads())
    for seed in range(2):
        compiled(tokens(B, S, seed))
        assert module(**batch(seed))["loss"].item() == pytest.approx(expected[seed], rel=1e-6)
    torch._dynamo.reset()


def test_a_residue_sees_what_is_before_it_and_no_label():
    module = dual(lora=False).eval()
    module.model.config.sliding_window = S  # nothing falls out of the window
    at, given = 12, batch()

    @torch.no_grad()
    def logits(changed, position=None):
        ids = changed["input_ids"].clone()
        if position is not None:
            ids[:, position] = (ids[:, position] - 3 + 7) % (VOCAB - 3) + 3
        with last_hidden_state(module.model) as hidden:
            module.model(ids, labels=changed["labels"])
        return module.heads(hidden())["3di"][:, at]

    base = logits(given)
    other = batch(seed=5)
    assert torch.equal(logits(given | {name: ids for name, ids in other.items() if name != "input_ids"}), base)
    for position in range(at + 1, S):
        assert relative_error(logits(given, position), base) < 1e-6, position
    for position in (0, 5, at - 1, at):
        assert relative_error(logits(given, position), base) > 1e-4, position


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accelerated_step_is_the_stock_step(checkpointing):
    ours, stock = dual(accelerated=True, checkpointing=checkpointing), dual(checkpointing=checkpointing)
    mine, theirs = ours(**batch()), stock(**batch())
    mine["loss"].backward()
    theirs["loss"].backward()
    for part in theirs:
        assert relative_error(mine[part].detach(), theirs[part].detach()) < 1e-5, part
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad, expected[name].grad) < 1e-4, name


def test_trainer_trains_it_and_divides_by_the_accumulated_batches():
    """Two batches of one are one batch of two where all samples have as many labels."""
    samples = []
    for seed in range(4):
        one = batch(seed, B=1)
        classes = labels(0, B=1)  # the same positions in every sample
        one |= {f"labels_{track}": torch.where(ids == IGNORED, ids, (ids + seed) % 8) for track, ids in classes.items()}
        samples.append({name: tensor[0].tolist() for name, tensor in one.items()})
    assert collate(samples[:2], 0)["labels_3di"].shape == (2, S)

    def trained(size, accumulate):
        module = dual(accelerated=True)
        plan = Plan(steps=2, batch=size, accumulate=accumulate, learning_rate=1e-2, bf16=False, optimizer="sgd")
        run = train(module, samples, plan, pad=0, title="")
        return module, run

    (one, run), (two, _) = trained(2, 1), trained(1, 2)
    before = dual()
    assert len(set(run.losses)) == 2
    first = dict(before.named_parameters())
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        if a.requires_grad:
            moved = relative_error(a.detach(), first[name].detach())
            assert relative_error(a.detach(), b.detach()) < 1e-2 * moved, name
    assert one.model.is_gradient_checkpointing


def _gradients(how, mesh=None, rank=0, world=1):
    module = dual(accelerated=True, checkpointing=True)
    run = module
    if how == "ddp":
        run = DistributedDataParallel(module)
    elif how == "fsdp2":
        for layer in moe_layers(module):
            fully_shard(layer, mesh=mesh)
        fully_shard(module.heads, mesh=mesh)
        fully_shard(module, mesh=mesh)
    given = {name: tensor.chunk(world)[rank] for name, tensor in _even_batch().items()}
    run(**given)["loss"].backward()
    whole = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return whole, module.heads


def _even_batch():
    """The same positions labelled in both rows, so that the mean of the rows' losses is the batch's."""
    made = batch()
    for track, ids in labels(3, B=1).items():
        made[f"labels_{track}"] = torch.cat([ids, torch.where(ids == IGNORED, ids, (ids + 1) % 8)])
    return made


def _worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for how in ("ddp", "fsdp2"):
            gradients, module = _gradients(how, mesh, rank, 2)
            module.save(f"{path}/{how}.safetensors")
            if rank == 0:
                torch.save(gradients, f"{path}/{how}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    expected, module = _gradients("one process")
    for how in ("ddp", "fsdp2"):
        got = torch.load(tmp_path / f"{how}.pt")
        assert list(got) == list(expected)
        for name, gradient in expected.items():
            assert relative_error(got[name], gradient) < 1e-4, (how, name)
        saved = ResidueHeads.load(tmp_path / f"{how}.safetensors").state_dict()  # whole tensors, sharded or not
        assert all(torch.equal(saved[name], tensor) for name, tensor in module.state_dict().items())


# --- letters and files ------------------------------------------------------------------------------------------------


def test_letters_are_the_classes():
    module = heads()
    assert module.encode("dssp", "HECTSGBI") == list(range(8))
    assert module.encode("3di", "AYX-", unknown="X-") == [0, 19, IGNORED, IGNORED]
    assert module.decode("3di", torch.tensor([0, 19, 1])) == "AYC"
    assert module.decode("dssp", module.encode("dssp", "TTHH")) == "TTHH"
    with pytest.raises(ValueError, match=r"ACDEFGHIKLMNPQRSTVWY for '3di', got 'd' at position 1; .*unknown"):
        module.encode("3di", "Dd")
    with pytest.raises(ValueError, match=r"track: expected one of 3di, dssp, got 'q3'"):
        module.encode("q3", "H")


def test_file_brings_back_weights_and_classes(tmp_path):
    path, module = tmp_path / "heads.safetensors", heads(tracks={"q3": "HEC", "3di": TRACKS["3di"]})
    module.save(path)
    loaded = ResidueHeads.load(path, tracks=module.tracks)
    assert loaded.tracks == module.tracks
    hidden = torch.randn(5, HIDDEN)
    for track, logits in module(hidden).items():
        assert torch.equal(loaded(hidden)[track], logits)
    assert json.dumps(sorted(load_file(path))) == json.dumps(sorted(module.state_dict()))
    with pytest.raises(ValueError, match=r"tracks: expected q3 \(EHC\), got q3 \(HEC\), 3di \(ACD.*\) in .*heads"):
        ResidueHeads.load(path, tracks={"q3": "EHC"})


def test_file_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path, module = tmp_path / "heads.safetensors", heads()
    module.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        heads(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(FileNotFoundError):
        ResidueHeads.load(path)
    path.write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="path: expected a safetensors file"):
        ResidueHeads.load(path)
    save_file({"a.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match=r"path: expected a file that ResidueHeads\.save wrote"):
        ResidueHeads.load(path)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "hidden_size: expected at least 1, got 0"),
        ((8, {}), "tracks: expected at least one name"),
        ((8, {"a.b": "AB"}), "tracks: expected names of letters, digits and underscores, got 'a.b'"),
        ((8, {"keys": "AB"}), "tracks: expected names .* got 'keys'"),
        ((8, {"q3": "HEH"}), "tracks: expected distinct letters, one per class, for 'q3', got 'HEH'"),
        ((8, {"q3": ""}), "tracks: expected distinct letters"),
    ],
)
def test_what_heads_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResidueHeads(*arguments)


def test_labels_that_do_not_fit():
    module, hidden, given = heads(), torch.randn(B, S, HIDDEN), labels()
    for wrong, message in (
        ({"dssp": given["dssp"]}, "labels: expected the tracks 3di, dssp, got dssp; label with -100"),
        (given | {"q3": given["dssp"]}, "labels: expected the tracks 3di, dssp, got 3di, dssp, q3"),
        (given | {"3di": given["3di"][:, 1:]}, r"labels\['3di'\]: expected \[2, 24\], .* got \[2, 23\]"),
        (given | {"dssp": given["3di"]}, r"labels\['dssp'\]: expected ids from 0 to 7, or -100, got 0 to 19"),
        (given | {"dssp": torch.full((B, S), -1)}, r"labels\['dssp'\]: .* got -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            module.loss(hidden, wrong)
    with pytest.raises(ValueError, match=r"hidden: expected \[..., 64\], got \[2, 3\]"):
        module(torch.zeros(2, 3))


def test_a_model_without_a_hidden_state():
    model = helpers.gemma4()
    with (
        pytest.raises(ValueError, match="expected a language model of transformers, got a Linear"),
        last_hidden_state(nn.Linear(2, 2)),
    ):
        pass
    with last_hidden_state(model) as hidden:
        pass
    with pytest.raises(RuntimeError, match="expected a call of the model in the block, its Gemma4TextModel was not"):
        hidden()
    with pytest.raises(ZeroDivisionError), last_hidden_state(model):
        _ = 1 / 0
    assert not model.model._forward_hooks


def test_a_decoder_that_drops_positions():
    """Layers that share keys and values run on the positions that `logits_to_keep` leaves."""
    model = helpers.gemma4()
    with last_hidden_state(model) as hidden:
        handle = model.model.register_forward_pre_hook(lambda *_: None)
        model.model.norm.register_forward_hook(lambda module, args, output: output[:, -1:])
        model(tokens(B, S), logits_to_keep=1)
        handle.remove()
    with pytest.raises(RuntimeError, match=r"expected the positions \[2, 24\] of the input, the model kept \[2, 1\]"):
        hidden()


def test_inputs_that_a_dual_head_misses():
    module, given = dual(), batch()
    expected = module(**given)["residue_loss"]
    module.weight = 1.0  # without a language loss: its labels are not needed and not used
    for labelled in (given, {key: tensor for key, tensor in given.items() if key != "labels"}):
        out = module(**labelled)
        assert out.keys() == {"loss", "residue_loss"}
        assert relative_error(out["loss"].detach(), expected) < 1e-6
    module.weight = 0.5
    for name in ("labels", "labels_3di", "labels_dssp"):
        with pytest.raises(TypeError, match=f"got no {name}"):
            module(**{key: tensor for key, tensor in given.items() if key != name})
    with pytest.raises(ValueError, match="weight: expected a share between 0 and 1, got 2"):
        DualHead(helpers.gemma4(), heads(), weight=2)
    with pytest.raises(AttributeError, match="nowhere"):
        _ = module.nowhere
    assert module.config is module.model.config
    assert math.isfinite(copy.deepcopy(module)(**given)["loss"].item())
