"""Who takes the decode path, and what a launch hands to cuda.core. A stand-in takes the place of the driver."""

import importlib.util
import sys
import types

import pytest
import torch

from omnigene_fast import reference
from omnigene_fast.backends import Lora
from omnigene_fast.cuda import Kernel, decode, launch

from .emulated import emulate, needs_compiler

NO_LORA = Lora(None, None, None, None)


class OnCuda:
    """The shape and dtype of a tensor on a GPU that is not there."""

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.tensor = torch.empty(shape, dtype=dtype, device="meta")
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.tensor, name)


def serves(T=1, K=8, dtype=torch.bfloat16, weight=None, lora=NO_LORA, save=False):
    gate_up = OnCuda(128, 1408, 2816, dtype=weight or dtype)
    return decode.serves(OnCuda(T, 2816, dtype=dtype), gate_up, OnCuda(T, K, dtype=torch.int64), lora, save)


def test_what_it_serves(monkeypatch):
    monkeypatch.setattr(decode, "unavailable", lambda device: None)
    monkeypatch.delenv("OMNIGENE_FAST_DECODE", raising=False)
    assert serves(1)
    assert serves(16, 16, torch.float32)
    assert serves(7, 1, torch.float16, torch.int8)
    assert serves(2, 2, torch.bfloat16, torch.float8_e4m3fn)
    assert not serves(17)
    assert not serves(0)
    assert not serves(K=17)
    assert not serves(save=True)
    assert not serves(lora=NO_LORA._replace(down_rhs=torch.ones(1)))
    assert not serves(dtype=torch.float64)
    assert not serves(weight=torch.float16)
    monkeypatch.setenv("OMNIGENE_FAST_DECODE", "0")
    assert not serves()
    monkeypatch.setenv("OMNIGENE_FAST_DECODE", "1")
    assert serves()
    monkeypatch.setattr(decode, "unavailable", lambda device: "no NVRTC")
    assert not serves()


def test_cpu_tensors_are_not_its():
    x = torch.zeros(1, 16)
    assert not decode.serves(x, torch.zeros(2, 8, 16), torch.zeros(1, 1, dtype=torch.int64), NO_LORA, False)


@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_backend_hands_over(monkeypatch):
    """With the emulator in the place of the GPU, `expert_mlp` of the backend gives the decode kernels' output."""
    from omnigene_fast.backends import triton as backend

    calls = []
    expert_mlp = decode.expert_mlp

    def emulated(*arguments):
        calls.append(arguments)
        return expert_mlp(*arguments, run=emulate())

    monkeypatch.setattr(decode, "unavailable", lambda device: None)
    monkeypatch.setattr(decode, "expert_mlp", emulated)
    monkeypatch.setattr(decode, "serves", lambda hidden, gate_up, index, lora, save: not save)
    hidden, gate_up, down = torch.randn(2, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8)
    index, weights = torch.tensor([[2, 0], [1, 2]]), torch.rand(2, 2)
    out, pre = backend.expert_mlp(hidden, gate_up, down, index, weights, NO_LORA, "silu", False, False)
    assert pre is None
    assert len(calls) == 1
    truth = reference.expert_mlp(hidden, gate_up, down, index, weights, activation="silu")
    torch.testing.assert_close(out, truth)


@pytest.fixture
def core(monkeypatch):
    """A cuda.core that writes down what it is asked for."""
    asked = types.SimpleNamespace(launches=[], loaded=[], streams=[], current=[])

    class Device:
        def __init__(self, index):
            self.index = index

        def set_current(self):
            asked.current.append(self.index)

        def create_stream(self, stream):
            assert self.index in asked.current, "cuda.core refuses a device that was never made current"
            asked.streams.append((self.index, stream.__cuda_stream__()))
            return "stream"

    class LaunchConfig:
        programmatic_stream_serialization = False

        def __init__(self, grid, block, **options):
            self.grid, self.block, self.options = grid, block, options

    class ObjectCode:
        @staticmethod
        def from_cubin(cubin, name):
            asked.loaded.append((cubin, name))
            return types.SimpleNamespace(get_kernel=lambda kernel: f"{cubin} {kernel}")

    module = types.ModuleType("cuda.core")
    module.Device, module.LaunchConfig, module.ObjectCode = Device, LaunchConfig, ObjectCode
    module.launch = lambda *arguments: asked.launches.append(arguments)
    parent = types.ModuleType("cuda")
    parent.core = module
    monkeypatch.setitem(sys.modules, "cuda", parent)
    monkeypatch.setitem(sys.modules, "cuda.core", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(Kernel, "cubin", lambda self, arch: f"{self.name} for {arch}")
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "_here", types.SimpleNamespace())
    for cached in (launch._stream, launch._config, launch._compute_major):
        cached.cache_clear()
    yield asked
    for cached in (launch._stream, launch._config, launch._compute_major):
        cached.cache_clear()


def step(T=2, K=2, E=4, H=64, I=32):  # noqa: E741
    """One call of `decode.expert_mlp` on CPU tensors, launched on a device that is not there."""
    projections = torch.zeros(E, 2 * I, H, dtype=torch.bfloat16), torch.zeros(E, H, I, dtype=torch.bfloat16)
    arguments = (torch.zeros(T, H, dtype=torch.bfloat16), *projections, torch.zeros(T, K).long(), torch.zeros(T, K))
    device = torch.device("cuda", 3)
    out = decode.expert_mlp(*arguments, "gelu", run=lambda _, launches: launch.launch(device, launches))
    return arguments, out


def test_what_is_launched(core):
    arguments, out = step()
    (up_stream, up_config, up, *up_words), (_, down_config, down, *down_words) = core.launches
    assert (core.current, core.streams, up_stream) == ([3], [(3, (0, 77))], "stream")
    assert (up, down) == ("decode_up for sm_90 decode_up", "decode_down for sm_90 decode_down")
    assert (up_config.grid, up_config.block, up_config.options) == ((4, 4), 128, {})
    assert (down_config.grid, down_config.block) == ((8, 1), 128)
    assert down_config.options == {"programmatic_stream_serialization": True}
    hidden, gate_up, down_proj, index, weights = (tensor.data_ptr() for tensor in arguments)
    h = up_words[4]
    # Plain integers, because cuda.core passes those, and a bool not, in 64 bits.
    assert all(type(word) is int for word in (*up_words, *down_words))
    assert up_words == [hidden, gate_up, 0, index, h, 4, 2, 4, 64, 32, 64, 64 * 64, 64, 32, 1, 1]
    assert down_words == [h, down_proj, 0, index, weights, out.data_ptr(), 4, 2, 4, 64, 32, 32, 32 * 64, 32, 1, 0, 1]
    step()
    assert len(core.loaded) == 2, "a kernel is loaded once"
    assert len(core.launches) == 4


def test_before_hopper_grids_do_not_overlap(core, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    step()
    assert core.launches[1][1].options == {}


def test_a_capture_cannot_load(core, monkeypatch):
    """The first call under a CUDA graph's capture says what to do; after `prepare` it is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"decode_up bfloat16 .* run the model once before the capture"):
        step()
    assert core.launches == core.loaded == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    decode.prepare(torch.device("cuda", 3), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step()
    assert len(core.launches) == 2
