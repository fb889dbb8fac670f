# make demo   create .venv, install everything, run the demo
# make test   the same install, then ruff, mypy and the whole test suite
# make versions  a minute with the oldest and the newest versions that are admitted, in environments of their own
# make bench  measure this machine; rows and plot in bench/results
# make examples  the OmniGene-4 workflow on a small model; out/index.html shows what came of it
# make kernels  compile every GPU kernel, without a GPU, and write docs/kernels.md
# Needs Python >= 3.11 with venv and, for the C++ kernels, a C++ compiler (Debian, Ubuntu: python3-venv python3-dev g++).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/cpu/*)
RESULTS := bench/results
CPU_TORCH := $(shell sed -n 's/^torch==//p' constraints-cpu.txt)
# Without a GPU, a CPU build of torch and nothing of CUDA: from the configured index if it offers one, else from PyTorch's.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: demo test versions lint typecheck pytest bench tables kernels examples install clean

demo: $(INSTALLED)
	$(BIN)/omnigene-fast demo

test: lint typecheck pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -q

versions:
	tests/versions/run.sh oldest
	tests/versions/run.sh newest

bench: $(INSTALLED)
	$(BIN)/omnigene-fast bench --out $(RESULTS)
	$(MAKE) tables

tables: $(INSTALLED)
	$(BIN)/python -m omnigene_fast.bench.report --readme README.md

kernels: $(INSTALLED)
	$(BIN)/omnigene-fast kernels --check --markdown docs/kernels.md

examples: $(INSTALLED)
	$(BIN)/python examples/omnigene/run_all.py

install: $(INSTALLED)

# Editable: the tests and the README's tables belong to this checkout, and a second, installed copy would be shadowed by it.
$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python >= 3.11 is needed, $(PYTHON) is older; run make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "make: no virtual environment; install python3-venv"; exit 1; }
ifeq ($(GPU),yes)
	@echo "installing torch and omnigene-fast for this machine's GPU (minutes, gigabytes) ..."
	@$(PIP) -e '.[test]'
else
	@echo "installing the CPU build of torch $(CPU_TORCH) (200 MB) ..."
	@if $(BIN)/python -m pip index versions torch 2>/dev/null | grep -qF '$(CPU_TORCH)+cpu'; then \
		$(PIP) -c constraints-cpu.txt 'torch==$(CPU_TORCH)+cpu'; \
	else \
		$(PIP) -c constraints-cpu.txt --index-url https://download.pytorch.org/whl/cpu torch; \
	fi
	@echo "installing omnigene-fast with its tests' tools, compiling the C++ kernels ..."
	@$(PIP) -c constraints-cpu.txt -e '.[test]'
endif
	@touch $@
	@echo "installed in $(VENV)"

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f omnigene_fast/_cpu*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
