"""What an install holds, and what importing it touches (known bugs 35 and 37)."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import omnigene_fast

ROOT = Path(__file__).parent.parent
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "csrc",
    "kernels",
    "omnigene_fast",
    "bench",
)
NO_COMPILER = {"PATH": "/nonexistent", "CXX": "/nonexistent"}


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of a wheel that was built from an sdist on a machine without a compiler."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    junk = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=junk)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})", cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert not inside & {"tests", "Makefile", "examples", "docs"}, "all of them or none: they belong to the checkout"
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out))
    run(*pip, str(sdist), cwd=out, **NO_COMPILER)
    (built,) = out.glob("*.whl")
    installed = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(installed)
    return installed


def test_bug_35_the_wheel_holds_every_source(wheel):
    """35: flash-attn and causal-conv1d need torch, nvcc and a matching ABI to install. This needs none of them."""
    for pattern in ("kernels/**/*.py", "kernels/**/*.json", "omnigene_fast/**/*.py"):
        for path in ROOT.glob(pattern):
            inside = path.relative_to(ROOT)
            if inside.parts[0] == "kernels":
                inside = Path("omnigene_fast", inside)
            assert (wheel / inside).read_bytes() == path.read_bytes(), inside
    assert any((wheel / "omnigene_fast/kernels").glob("*.py"))
    assert (wheel / "omnigene_fast/py.typed").exists()
    top = {path.name for path in wheel.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"omnigene_fast"}
    assert not list(wheel.rglob("*.so"))


def test_bug_35_without_a_compiler_it_installs_and_says_what_is_missing(wheel):
    """35: the reference runs, an explicit request for the C++ backend raises one sentence."""
    script = """
import sys
# An editable install's finder would add the compiled module of the checkout to this copy.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, omnigene_fast
from omnigene_fast.ops import topk_gate
assert omnigene_fast.__version__ == "0.1.0", omnigene_fast.__version__
arguments = torch.arange(4.0)[None], torch.ones(4)
assert topk_gate(*arguments, top_k=2)[2].tolist() == [[3, 2]]
try:
    topk_gate(*arguments, top_k=2, backend="cpu")
except RuntimeError as error:
    print(omnigene_fast.__file__, error)
"""
    out = run(sys.executable, "-c", script, cwd=wheel, PYTHONPATH=str(wheel))
    assert out.startswith(str(wheel))
    assert "was not built" in out
    assert "install a C++ compiler" in out


def test_bug_37_our_kernels_do_not_shadow_the_pypi_package():
    """37: with the repository root first on the path, `kernels` is no package of ours, and transformers sees none."""
    script = """
import importlib.util, sys
from transformers.utils import is_kernels_available
installed = [path for path in sys.path[1:] if importlib.machinery.PathFinder.find_spec("kernels", [path])]
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None, is_kernels_available(), bool(installed))
"""
    origin, available, installed = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(ROOT)).split()
    assert not origin.startswith(str(ROOT))
    assert (available == "True") <= (installed == "True")
    assert not (ROOT / "kernels/__init__.py").exists()
    assert os.readlink(ROOT / "omnigene_fast/kernels") == "../kernels"


def test_an_editable_install_exposes_omnigene_fast_alone(tmp_path):
    """From outside the checkout `import kernels`, which transformers tries, finds nothing of ours; ours is there."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=junk)
        else:
            shutil.copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source, **NO_COMPILER)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = f"""
import importlib, importlib.util, pathlib, site, sys
# The checkout that runs this may be an editable install itself, by a finder of the same name.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {str(site)!r})
site.addsitedir({str(site)!r})
sys.meta_path.sort(key=lambda finder: "editable" not in getattr(finder, "__module__", ""))
source = pathlib.Path({str(source)!r})
for name in ("kernels", "bench", "tests", "csrc"):
    spec = importlib.util.find_spec(name)
    found = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    assert not any(str(source) in str(path) for path in found), (name, found)
for name in ("omnigene_fast", "omnigene_fast.kernels.tables", "omnigene_fast.bench.timing"):
    assert source in pathlib.Path(importlib.util.find_spec(name).origin).parents, name
"""
    run(sys.executable, "-c", script, cwd=tmp_path)


def test_importing_needs_neither_triton_nor_a_gpu():
    """torch itself looks for triton; ours must import without it, and must not load its kernels."""
    script = """
import sys
sys.modules["triton"] = None
import omnigene_fast
loaded = [n for n in sys.modules if n.startswith(("omnigene_fast.kernels", "omnigene_fast.backends."))]
assert not loaded, loaded
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "omnigene_fast" in ALL_EXPERTS_FUNCTIONS
import torch
assert not torch.cuda.is_initialized()
"""
    run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")


def test_importing_does_not_load_the_modelling_code():
    script = """
import sys, omnigene_fast
assert not {"transformers.models.gemma4.modeling_gemma4", "omnigene_fast.heads"} & sys.modules.keys()
from omnigene_fast import trace  # counts in memory need no package of the store
assert not {"pyarrow", "pandas", "duckdb", "plotly"} & sys.modules.keys()
"""
    run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(ROOT))


def test_public_names():
    names = {"__version__", "accelerate", "ops", "restore"}
    names |= {"RouterTraceCallback", "analysis", "open_trace", "replay", "trace"}
    assert set(omnigene_fast.__all__) == names
    assert all(hasattr(omnigene_fast, name) for name in names)
    assert names <= set(dir(omnigene_fast))
    with pytest.raises(AttributeError, match="has no attribute 'traces'"):
        _ = omnigene_fast.traces


def test_bug_35_without_pybind11_the_install_goes_on(tmp_path):
    """35: `pip install --no-build-isolation` on a machine that lacks what the build would have brought along."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "pybind11.py").write_text("raise ImportError('No module named pybind11')")
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", "out")
    inherited = os.environ | {"PYTHONPATH": str(tmp_path / "missing")}
    done = subprocess.run(
        command, cwd=tmp_path, env=inherited, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "No module named pybind11: omnigene_fast._cpu was not built" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("_cpu*.so"))
