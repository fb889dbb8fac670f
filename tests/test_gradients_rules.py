"""The rules of a backward: it writes into nothing, computes what is needed, repeats itself, and keeps little."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from omnigene_fast import ops, reference
from omnigene_fast.ops import expert_mlp

from . import gradients
from .gradients import FROZEN, FULL, LORA, NAMES, PROJECTIONS, problem
from .helpers import ROUTINGS, allocations, assert_same, backend_params, relative_error

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
OPS = torch.ops.omnigene_fast

backends = pytest.mark.parametrize("backend", backend_params())
saves = pytest.mark.parametrize("save", ops.SAVE)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16])


@backends
@saves
@pytest.mark.parametrize("layout", ["transposed", "strided rows", "expanded row", "expanded scalar"])
@dtypes
def test_layouts_of_the_incoming_gradient(layout, dtype, save, backend):
    p = problem(33, dtype=dtype, rank=3)
    grad = {
        "transposed": p.grad.t().contiguous().t(),
        "strided rows": F.pad(p.grad, (2, 5))[:, 2:-5],
        "expanded row": p.grad[:1].expand(p.grad.shape),
        "expanded scalar": torch.ones((), dtype=dtype).expand(p.grad.shape),
    }[layout]
    mine = gradients.ours(p, grad=grad, backend=backend, save=save)
    for name, expected in gradients.ours(p, grad=grad.contiguous(), backend=backend, save=save).items():
        assert_same(mine[name], expected, backend)
        assert mine[name].is_contiguous()


@backends
@saves
@dtypes
def test_bug_04_a_backward_that_writes_into_its_inputs(dtype, save, backend):
    """4: Liger's GEGLU backward reuses what it was given, so that a second one is silently wrong."""
    p = problem(65, dtype=dtype, rank=3)
    leaves, grad, saved = p.leaves(NAMES), p.grad.clone(), []

    def pack(tensor):
        saved.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = expert_mlp(
            *(leaves[name] for name in ("hidden", *PROJECTIONS)),
            p.index,
            leaves["weights"],
            activation="gelu_tanh",
            gate_up_lora=(leaves["gate_up_lhs"], leaves["gate_up_rhs"]),
            down_lora=(leaves["down_lhs"], leaves["down_rhs"]),
            save=save,
            backend=backend,
        )
    wanted = [leaves[name] for name in NAMES]
    first = torch.autograd.grad(out, wanted, grad, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(out, wanted, grad)
    for mine, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(mine, copy)
        assert torch.equal(mine, again)
    assert len(saved) >= 9
    assert all(torch.equal(tensor, copy) for tensor, copy in saved)
    assert torch.equal(grad, p.grad)
    assert all(torch.equal(leaves[name], p.tensors[name]) for name in NAMES)


@backends
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ROUTINGS)
def test_bug_13_two_runs_two_gradients(mode, threads, backend):
    """13: Unsloth's `index_add_` and pipelined stores: 20 runs, bit for bit."""
    if backend == "reference" and threads > 1:
        pytest.skip("torch's own products, not ours, and slow to start threads for")
    p = problem(129, 32, 8, 96, 40, dtype=BF16, rank=16, mode=mode)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = gradients.ours(p, backend=backend)
        for _ in range(19):
            again = gradients.ours(p, backend=backend)
            assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@backends
@saves
def test_only_what_is_needed(save, backend):
    """Every subset of the eight gradients: the same values, and nothing else comes out of the operator."""
    p = problem(9, rank=2)
    expected = gradients.ours(p, backend=backend, save=save)
    arguments = [p.tensors[name] for name in ("hidden", *PROJECTIONS)] + [p.index, p.tensors["weights"]]
    arguments += [*(p.tensors[name] for name in LORA), None, None]
    kept = OPS.expert_mlp_fwd(*arguments, "gelu_tanh", False, save == "preactivation", backend)[1]
    for needed in itertools.product((False, True), repeat=8):
        grads = OPS.expert_mlp_bwd(p.grad, *arguments, kept, "gelu_tanh", False, needed, backend)
        for name, need, grad in zip(NAMES, needed, grads, strict=True):
            if need:
                assert relative_error(grad, expected[name]) < 1e-6, (name, needed)
            else:
                assert grad.numel() == 0
    for name in NAMES:
        assert set(gradients.ours(p, (name,), backend=backend, save=save)) == {"out", name}


@backends
def test_a_bad_token_keeps_to_itself(backend):
    p = problem(33)
    expected = gradients.ours(p, FROZEN, backend=backend)
    p.tensors["hidden"][7, 3] = float("nan")
    mine = gradients.ours(p, FROZEN, backend=backend)
    others = torch.arange(33) != 7
    for name in FROZEN:
        assert torch.equal(mine[name][others], expected[name][others])
        assert not mine[name][7].isfinite().all()


@backends
@dtypes
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_bug_05_gradients_at_extreme_gates(activation, dtype, backend):
    """5: Liger #1398: gradients that are not finite where the gate is far out."""
    gate = torch.tensor([-1e4, -100.0, -20.0, -9.0, 0.0, 9.0, 20.0, 100.0, 1e4])
    hidden = torch.stack([gate, torch.ones(9)], dim=1).to(dtype).requires_grad_()
    gate_up, down = torch.eye(2, dtype=dtype)[None], torch.ones(1, 2, 1, dtype=dtype)  # gate = x0, up = x1
    weights = torch.ones(9, 1, requires_grad=True)
    arguments = gate_up, down, torch.zeros(9, 1, dtype=torch.int64)
    out = expert_mlp(hidden, *arguments, weights, activation=activation, backend=backend)
    out[:, 0].sum().backward()
    exact = hidden.detach().double().requires_grad_()
    (reference.ACTIVATIONS[activation](exact[:, 0]) * exact[:, 1]).sum().backward()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    assert torch.allclose(hidden.grad.double(), exact.grad, **tolerance)
    assert torch.allclose(weights.grad.double()[:, 0], out.detach().double()[:, 0], **tolerance)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("function", ["operator", "reference"])
def test_gradcheck(function, activation):
    """The written formulas, and torch's autograd of the reference, against differences in float64."""
    p = problem(5, 4, 2, 6, 3, dtype=F64, rank=2)
    leaves = p.leaves(NAMES)
    call = expert_mlp if function == "operator" else reference.expert_mlp

    def block(hidden, gate_up, down, weights, up_lhs, up_rhs, down_lhs, down_rhs):
        lora = {"gate_up_lora": (up_lhs, up_rhs), "down_lora": (down_lhs, down_rhs)}
        return call(hidden, gate_up, down, p.index, weights, activation=activation, **lora)

    leaves["weights"] = leaves["weights"].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(block, [leaves[name] for name in NAMES], fast_mode=False)


@backends
@saves
def test_compiled_forward_and_backward(save, backend):
    """One graph each way, with and without low-rank updates, static and dynamic in T."""

    options = {"activation": "gelu_tanh", "save": save, "backend": backend}

    def block(hidden, gate_up, down, index, weights, *lora):
        pairs = {"gate_up_lora": lora[:2], "down_lora": lora[2:]} if lora else {}
        return expert_mlp(hidden, gate_up, down, index, weights, **options, **pairs)

    torch._dynamo.reset()
    for rank in (0, 2):
        for dynamic in (False, True):
            compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            for T in (7, 12):
                p = problem(T, rank=rank)
                results = []
                for call in (compiled, block):
                    leaves = p.leaves(NAMES)
                    lora = [leaves[name] for name in LORA if leaves[name] is not None]
                    out = call(*(leaves[n] for n in ("hidden", *PROJECTIONS)), p.index, leaves["weights"], *lora)
                    out.backward(p.grad)
                    results.append([out.detach()] + [x.grad for x in leaves.values() if x is not None])
                assert all(torch.equal(mine, same) for mine, same in zip(*results, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


def _saved_bytes(p, save, backend, frozen=True):
    """Bytes per token that autograd keeps, without the weights, which are there anyway."""
    sizes = []
    wanted = FROZEN if frozen else NAMES
    parameters = [x.shape for name, x in p.tensors.items() if x is not None and name in (*PROJECTIONS, *LORA)]

    def pack(tensor):
        if tensor.shape not in parameters:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients.ours(p, wanted, backend=backend, save=save)
    return sum(sizes) / p.index.shape[0]


@pytest.mark.parametrize(("save", "bytes_per_token"), [("preactivation", 28_160), ("input", 5_632)])
@pytest.mark.parametrize("rank", [0, 16])
def test_saved_bytes_per_token_at_the_true_shape(rank, save, bytes_per_token):
    """The 26B-A4B in bfloat16: 28,160 or 5,632 bytes, and 8 ids of 8 bytes and 8 weights of 4 bytes."""
    T, E, K, H, I = 64, 128, 8, 2816, 704  # noqa: E741

    def empty(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors = dict.fromkeys(NAMES)
    tensors |= {"hidden": empty(T, H), "gate_up_proj": empty(E, 2 * I, H), "down_proj": empty(E, H, I)}
    tensors["weights"] = empty(T, K, dtype=F32)
    if rank:
        shapes = (E, 2 * I, rank), (E, rank, H), (E, H, rank), (E, rank, I)
        tensors |= {name: empty(*shape) for name, shape in zip(LORA, shapes, strict=True)}
    p = gradients.Problem(tensors, empty(T, K, dtype=torch.int64), empty(T, H))
    assert _saved_bytes(p, save, "auto") == bytes_per_token + K * (8 + 4)


@backends
@saves
@pytest.mark.parametrize("frozen", [True, False])
def test_saved_bytes_of_every_backend(frozen, save, backend):
    p = problem(40, 16, 4, 96, 40, dtype=BF16)
    kept = 2 * 96 + 4 * (8 + 4) + (4 * 2 * 40 * 2 if save == "preactivation" else 0)
    assert _saved_bytes(p, save, backend, frozen) == kept


@backends
@saves
@pytest.mark.parametrize("rank", [0, 2])
def test_bug_20_weight_sized_buffers_of_frozen_experts(rank, save, backend):
    """20: transformers' grouped_mm fallback computes dW for frozen weights and drops it."""
    p = problem(16, 64, 4, 96, 72, rank=rank)
    largest = {}
    for wanted in ((*FROZEN, *LORA), NAMES):
        with allocations() as sizes:
            gradients.ours(_shared(p), wanted, backend=backend, save=save)
        largest[wanted] = max(sizes)
    weight = p.tensors["down_proj"].numel() * 4
    assert largest[(*FROZEN, *LORA)] < weight <= largest[NAMES]


def _shared(p):
    """`p` with leaves that are not copied, so that no allocation is the test's own."""

    class Shared(gradients.Problem):
        def leaves(self, wanted, dtype=None):
            return {n: None if x is None else x.detach().requires_grad_(n in wanted) for n, x in self.tensors.items()}

    return Shared(p.tensors, p.index, p.grad)


@backends
def test_bug_19_full_gradients_of_the_square_of_the_experts(backend):
    """19: transformers' eager backward fills a gradient of all experts for each expert: 105 s at T=256, E=128."""
    total = {}
    for E in (16, 64):
        p = problem(64, E, 4, 96, 40)
        for name, call in (("ours", gradients.ours), ("stock", gradients.stock)):
            options = {"backend": backend} if name == "ours" else {}
            with allocations() as sizes:
                call(_shared(p), FULL, **options)
            weights = sum(p.tensors[n].numel() * 4 for n in PROJECTIONS)
            total[name, E] = sum(size for size in sizes if size > weights / 4) / weights
    assert max(total["ours", E] for E in (16, 64)) <= 2
    assert total["stock", 64] > 2 * total["stock", 16] > 16, "the control does not show the square"
