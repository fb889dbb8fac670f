"""All scripts of the workflow in small, and the page that shows what they found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omnigene_fast import info

from .helpers import FOLDER, load

GOOD = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
table = {"kind": "table", "title": "numbers", "columns": ["what", "n"], "rows": [["<b>bold</b>", "1"]], "note": "a & b"}
out.joinpath("dot.png").write_bytes(b"pixels")
picture = {"kind": "picture", "file": "dot.png", "caption": "a dot"}
link = {"kind": "link", "file": "report.html", "text": "the report"}
content = {"title": "Fine", "about": " ".join(sys.argv[1:]), "parts": [table, picture, link]}
out.joinpath("result.json").write_text(json.dumps(content))
"""
BAD = 'import sys; print("working"); sys.exit("bad: --steps: expected more, got less.")'


@pytest.fixture
def run_all():
    return load("run_all")


@pytest.fixture
def small(run_all, monkeypatch, tmp_path):
    """run_all with three scripts of its own, of which one fails and one needs that; its main with some arguments."""
    for name, text in (("good.py", GOOD), ("bad.py", BAD)):
        (tmp_path / name).write_text(text)
    shutil.copy(FOLDER / "page.html.jinja", tmp_path)
    jobs = {
        "first": run_all.Job("good.py", "--value 1", "--value 2"),
        "broken": run_all.Job("bad.py", "", needs=("first",)),
        "later": run_all.Job("good.py", "--of {broken}/model", needs=("broken",)),
        "beside": run_all.Job("good.py", "--of {first}/model", needs=("first",)),
    }
    monkeypatch.setattr(run_all, "JOBS", jobs)
    monkeypatch.setattr(run_all, "HERE", tmp_path)

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["run_all", "--out", str(tmp_path / "out"), *arguments])
        run_all.main()
        return (tmp_path / "out" / "index.html").read_text()

    return call


def test_a_failing_script_is_named_and_the_others_run(small, tmp_path):
    with pytest.raises(SystemExit, match=r"2 of 4 scripts .* broken \(bad: --steps: expected more, got less\.\)"):
        small()
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("bad: --steps: expected more, got less.") == 2  # in the contents and in its own section
    assert "not run, because broken failed" in page
    assert f"--of {tmp_path}/out/first/model" in page
    assert "working" in (tmp_path / "out" / "broken" / "log.txt").read_text()
    assert not (tmp_path / "out" / "later").exists()


def test_what_the_scripts_say_stays_text(small):
    page = small("--only", "first")
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert "a &amp; b" in page
    assert "data:image/png;base64,cGl4ZWxz" in page
    assert 'href="first/report.html"' in page


def test_needs_come_along_and_quick_arguments_win(small):
    page = small("--only", "beside", "--quick")
    assert "--value 2" in page
    assert "--value 1" not in page
    assert "first/model" in page
    assert "Quick setting" in page
    assert "broken" not in page
    assert "Quick setting" not in small("--only", "first")


def test_an_old_result_does_not_pass_for_a_new_one(small, tmp_path):
    small("--only", "first")
    (tmp_path / "good.py").write_text("import sys; sys.exit('good: no.')")
    with pytest.raises(SystemExit, match=r"first \(good: no\.\)"):
        small("--only", "first")
    assert "numbers" not in (tmp_path / "out" / "index.html").read_text()


def test_every_script_of_the_folder_is_run(run_all):
    scripts = {path.name for path in FOLDER.glob("*.py") if "def main(" in path.read_text()}
    assert scripts - {"run_all.py"} == {job.script for job in run_all.JOBS.values()}
    for job in run_all.JOBS.values():
        assert set(job.needs) <= set(run_all.JOBS)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The folder that a quick run of all scripts leaves, without those whose programs are not installed."""
    run_all = load("run_all")
    missing = [name for name in info.PROGRAMS if shutil.which(name) is None]
    chosen = [name for name in run_all.JOBS if name != "homology" or not missing]
    out = tmp_path_factory.mktemp("everything")
    command = [sys.executable, FOLDER / "run_all.py", "--quick", "--only", *chosen, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    logs = "\n".join(f"{path.parent.name}: {path.read_text()[-1500:]}" for path in sorted(out.glob("*/log.txt")))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    assert done.stdout.strip().splitlines()[-1] == str(out / "index.html")
    return out


def results(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))}


def test_every_script_leaves_its_result(everything):
    run_all = load("run_all")
    found = results(everything)
    missing = {name for name in ("homology",) if any(shutil.which(program) is None for program in info.PROGRAMS)}
    assert set(found) == set(run_all.JOBS) - missing
    page = (everything / "index.html").read_text()
    for name, content in found.items():
        assert f'<section id="{name}">' in page
        assert any(part["kind"] == "table" and part["rows"] for part in content["parts"]), name
        for part in content["parts"]:
            if part["kind"] != "table":
                assert (everything / name / part["file"]).stat().st_size > 500, (name, part["file"])


def test_the_page_fits_a_window(everything, tmp_path):
    from ..analysis.browser import binary

    check = "<script>document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;</script></body>"
    page = tmp_path / "page.html"
    page.write_text((everything / "index.html").read_text().replace("</body>", check))
    for width in (1440, 800):
        command = [binary(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},1000"]
        command += ["--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert 'data-wide="' in dom
        assert int(dom.split('data-wide="')[1].split('"')[0]) <= 0
