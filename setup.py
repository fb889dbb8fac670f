"""Builds the optional C++ module `omnigene_fast._cpu`.

No torch, no probe of the machine, no network: every instruction-set variant is compiled, and the one to run is chosen
by CPUID when the module is loaded. Without a compiler the install still succeeds and `omnigene-fast info` says so.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CPU = Path("csrc/cpu")
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
COMMON += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the last: gcc 12's own headers
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
# One translation unit per instruction set with its own flags: gcc refuses templated intrinsics under
# __attribute__((target)), and a file built with -mavx512f must never be entered on a machine without it.
SOURCES: dict[str, list[str]] = {
    "bindings.cpp": [],
    "dispatch.cpp": [],
    "isa_portable.cpp": [],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
X86_ONLY = {"isa_avx2.cpp", "isa_avx512.cpp", "isa_avx512_bf16.cpp"}


class NinjaBuildExt(build_ext):
    """Compiles with ninja, because setuptools has no flags per source file."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
        except ImportError as error:  # an install with --no-build-isolation
            raise CompileError(f"{error}: omnigene_fast._cpu was not built") from error
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")
        if compiler is None:
            raise CompileError("no C++ compiler found (set CXX or install g++): omnigene_fast._cpu was not built")
        includes = [pybind11.get_include(), *self.compiler.include_dirs, *self.include_dirs]
        x86 = platform.machine().lower() in {"x86_64", "amd64"}
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            "  command = $cxx -shared -fopenmp $in -o $out",
            f"cxx = {_ninja_escape(compiler)}",
        ]
        objects = []
        for name, flags in SOURCES.items():
            if name in X86_ONLY and not x86:
                continue
            obj = _ninja_escape(str(build / f"{name}.o"))
            lines.append(f"build {obj}: cxx {_ninja_escape(str(ROOT / CPU / name))}")
            every = [*COMMON, *flags, *(f"-I{path}" for path in includes), *([] if x86 else ["-DOMNIGENE_NO_X86"])]
            lines.append("  flags = " + " ".join(_ninja_escape(flag) for flag in every))
            objects.append(obj)
        lines.append(f"build {_ninja_escape(str(output))}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise CompileError("the C++ compiler failed (its log is above): omnigene_fast._cpu was not built")


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# Naming these folders keeps an editable install from putting the checkout on sys.path, where `import kernels`, which
# transformers tries for the package of that name, would find ours.
FOLDERS = {"omnigene_fast.kernels": "kernels", "omnigene_fast.bench": "bench"}
INSIDE = [
    f"{name}.{package}"
    for name, folder in FOLDERS.items()
    for package in find_namespace_packages(folder, exclude=["results*", "predictions*", "tuned*"])
]

setup(
    packages=[
        *find_namespace_packages(include=["omnigene_fast*"], exclude=[f"{name}*" for name in FOLDERS]),
        *FOLDERS,
        *INSIDE,
    ],
    package_dir={"": ".", **FOLDERS},
    package_data={
        "omnigene_fast": ["py.typed"],
        "omnigene_fast.kernels": ["tuned/*.json"],
        "omnigene_fast.cuda.src": ["*.cu", "*.cuh"],
        "omnigene_fast.data": ["*.jsonl", "*.md"],
    },
    ext_modules=[
        Extension("omnigene_fast._cpu", [str(CPU / name) for name in SOURCES], optional=True),
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
