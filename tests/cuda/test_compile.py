"""Compilation without a GPU: every kernel for every architecture, the cache, and what is said when something fails."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from omnigene_fast.cuda import CompileError, Kernel, all_kernels, cache, launch, nvrtc

REASON = launch.unavailable()
needs_nvrtc = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TRITON = importlib.util.find_spec("triton") is not None
KERNEL = Kernel("decode_up", torch.bfloat16, torch.bfloat16, True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIGENE_FAST_CACHE", str(tmp_path))


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_compiles_for_gpus_that_are_not_there(arch):
    for name in ("decode_up", "decode_down"):
        cubin = Kernel(name, torch.bfloat16, torch.float8_e4m3fn, True).cubin(arch)
        assert cubin[:4] == b"\x7fELF"
        assert name.encode() in cubin


@needs_nvrtc
def test_a_cubin_is_compiled_once_and_again_when_damaged(monkeypatch, caplog):
    compiled = []
    compile_source = nvrtc.compile_source

    def counted(*arguments):
        compiled.append(arguments)
        return compile_source(*arguments)

    monkeypatch.setattr(nvrtc, "compile_source", counted)
    first = KERNEL.cubin("sm_90")
    assert KERNEL.cubin("sm_90") == first
    assert len(compiled) == 1
    (path,) = cache.folder().glob("*")  # and nothing that was written beside is left
    data = path.read_bytes()
    for damaged in (data[:-1], data[:100], b"", data[:50] + bytes([data[50] ^ 1]) + data[51:]):
        path.write_bytes(damaged)
        assert KERNEL.cubin("sm_90") == first
        assert path.read_bytes() == data
    assert len(compiled) == 5
    assert "damaged" in caplog.text
    KERNEL._replace(vec=False).cubin("sm_90")
    KERNEL.cubin("sm_80")
    assert len(list(cache.folder().glob("*"))) == 3


@needs_nvrtc
def test_the_key_depends_on_the_sources_and_the_compiler(monkeypatch):
    keys = []
    monkeypatch.setattr(cache, "read", lambda key: keys.append(key) or b"cubin")
    KERNEL.cubin("sm_90")
    monkeypatch.setattr(nvrtc, "version", lambda: "12.9")
    KERNEL.cubin("sm_90")
    monkeypatch.setattr(nvrtc, "sources", lambda: b"changed")
    KERNEL.cubin("sm_90")
    assert len(set(keys)) == 3


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMNIGENE_FAST_CACHE", str(tmp_path / "file"))
    assert KERNEL.cubin("sm_90")
    assert "cannot keep compiled kernels" in caplog.text


@needs_nvrtc
def test_errors_hold_the_compilers_log(monkeypatch, tmp_path):
    for path in nvrtc.SOURCES.iterdir():
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace("shared.ids[pick];", "shared.ids[pikc];"))
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    with pytest.raises(
        CompileError, match=r"decode_up.cu does not compile for sm_90 .*OMNIGENE_FAST_DECODE=0"
    ) as caught:
        nvrtc.compile_source("decode_up.cu", "sm_90", KERNEL.macros)
    assert 'identifier "pikc" is undefined' in str(caught.value)


def test_all_kernels_differ():
    kernels = all_kernels()
    assert len(kernels) == len(set(map(str, kernels))) == 36
    assert len({(kernel.name, *kernel.macros.values()) for kernel in kernels}) == 36


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(launch, "_installed", lambda name: name != "cuda.core")
    reason = launch._unavailable.__wrapped__(None, "")
    assert reason == "the package cuda-core is not installed; install it with `pip install 'omnigene-fast[cuda]'`."
    monkeypatch.setattr(launch, "_installed", lambda name: True)
    monkeypatch.setattr(nvrtc, "version", lambda: (_ for _ in ()).throw(OSError("libnvrtc.so.13 not found")))
    assert "NVRTC does not load (OSError: libnvrtc.so.13 not found)" in launch._unavailable.__wrapped__(None, "")


TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" if TRITON else Path()


@needs_nvrtc
@pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="no cuobjdump: it comes with triton")
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["decode_up", "decode_down"])
def test_resources_on_hopper(name, weight, tmp_path):
    """No spill, 16-byte loads of weights past the L1 cache, and as many blocks at once as a token needs."""
    kernel = Kernel(name, torch.bfloat16, weight, True)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.cubin("sm_90a"))

    def ask(tool, *options):
        return subprocess.run([TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout

    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", ask("cuobjdump", "-res-usage"))}
    assert usage["STACK"] == usage["LOCAL"] == 0
    registers = -(-usage["REG"] // 8) * 8 * kernel.threads
    blocks = {"decode_up": 704, "decode_down": 352}[name]
    assert 132 * (65536 // registers) >= blocks
    sass = ask("nvdisasm")
    loads = re.findall(r"LDG\.(\S*)", sass)
    # Those of a batch, and as many and more again of the loop for more than 8 tokens of one expert.
    assert sum("128" in load and "CONSTANT" in load for load in loads) >= {"decode_up": 8, "decode_down": 11}[name]
    assert "HMMA" in sass
