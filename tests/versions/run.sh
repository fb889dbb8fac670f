#!/usr/bin/env bash
# tests/versions/run.sh oldest|newest: this checkout with every lower bound of pyproject.toml, or with what a plain
# `pip install` gives today, in an environment of its own under .venv-oldest or .venv-newest; then smoke.py.
# torch is the CPU build that the index offers at that end, or the one of constraints-cpu.txt if it offers none there.
set -euo pipefail
which=${1:?oldest or newest}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.venv-$which
python=${PYTHON:-python3}
test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
"$venv/bin/python" - "$which" > "$venv/wanted.txt" <<'PY'
import re, subprocess, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras["trace"], *extras["report"][1:], *extras["train"]]
index = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True).stdout
offered = re.findall(r"(\d+\.\d+\.\d+)\+cpu", index)
ours = re.search(r"^torch==(.*)", open("constraints-cpu.txt").read(), re.M)[1]
lowest = next(re.search(r">=(.*)", one)[1] for one in wanted if one.startswith("torch>="))
if sys.argv[1] == "oldest":
    wanted = [one.replace(">=", "==") for one in wanted]
    torch = next((one for one in reversed(offered) if one.startswith(lowest)), ours)
else:
    torch = offered[0] if offered else ours
print(f"torch=={torch}+cpu")
print("\n".join(one for one in wanted if not one.startswith("torch")))
PY
pip install -r "$venv/wanted.txt"
pip install setuptools pybind11 ninja
pip install --no-deps --no-build-isolation .
cd "$venv"
bin/python ../tests/versions/smoke.py
