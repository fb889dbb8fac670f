"""The report in a real browser: what was drawn, what was logged, what overlaps."""

import json
import re
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from omnigene_fast.info import browser

# Runs once every figure is drawn. Faults: text over text, text outside its figure, a figure without size.
AUDIT = """
<script>
(() => {
  const looking = setInterval(() => {
    if (!document.body.dataset.rendered) return;
    clearInterval(looking);
    const faults = [];
    for (const plot of document.querySelectorAll(".plot")) {
      const box = plot.getBoundingClientRect();
      if (box.width < 200 || box.height < 100) faults.push(plot.id + ": no size");
      const texts = [...plot.querySelectorAll("svg text")].filter((text) => {
        const style = getComputedStyle(text);
        const seen = style.visibility !== "hidden" && +style.opacity > 0.1;
        return text.textContent.trim() && seen && !text.closest(".modebar");
      }).map((text) => ({
        box: text.getBoundingClientRect(), words: text.textContent,
        turned: /rotate\\((?!0,)-?\\d/.test(text.getAttribute("transform") || ""),
        size: parseFloat(getComputedStyle(text).fontSize),
      })).filter((text) => text.box.width > 0);
      for (const text of texts)
        if (text.box.left < box.left - 2 || text.box.right > box.right + 2 || text.box.top < box.top - 2 ||
            text.box.bottom > box.bottom + 2) faults.push(plot.id + ": cut off: " + text.words);
      for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
        const a = texts[i], b = texts[j];
        const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
        const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
        const room = (Math.abs(a.box.right - b.box.right) + Math.abs(a.box.top - b.box.top)) / Math.SQRT2;
        if (wide > 2 && high > 3 && !(a.turned && b.turned && room >= a.size))
          faults.push(plot.id + ": " + a.words + " over " + b.words);
      }
    }
    document.body.dataset.faults = JSON.stringify(faults);
  }, 50);
})();
</script>
"""


@dataclass
class Seen:
    """A page after its scripts ran."""

    body: dict  # attributes of <body>
    plots: dict  # id -> attributes
    figures: dict  # id -> number of drawn SVG layers inside
    text: str  # visible text
    scripts: int
    errors: list  # of the console

    @property
    def faults(self):
        return json.loads(self.body["data-faults"])

    def assert_sound(self, figures):
        """Every figure drawn whole, nothing wider than the window, nothing logged."""
        assert self.errors == []
        assert self.body["data-rendered"] == f"{figures}/{figures}"
        assert len(self.plots) == figures
        for name, attributes in self.plots.items():
            drawn, expected = attributes["data-traces"].split("/")
            assert int(drawn) >= int(expected) > 0, name
            assert self.figures[name] > 0, name
        assert int(self.body["data-overflow"]) <= 0


def binary():
    return browser() or pytest.skip("no Chromium to open the report in: apt-get install chromium")


def look(page, width, tmp_path, audit=False):
    """Open a page in a window of `width` pixels; `audit`: a copy without its policy, with `AUDIT` inside."""
    program = binary()
    if audit:
        text = page.read_text()
        policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text).group()
        page = tmp_path / "audit.html"
        page.write_text(text.replace(policy, "", 1).replace("</body>", AUDIT + "</body>"))
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=60000", f"--window-size={width},1000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    reader = _Reader()
    reader.feed(done.stdout)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(reader.body, reader.plots, reader.figures, " ".join(reader.words), reader.scripts, errors)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.body, self.plots, self.figures, self.words, self.scripts = {}, {}, {}, [], 0
        self._current, self._silent = None, False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        classes = (attributes.get("class") or "").split()
        if tag == "body":
            self.body = attributes
        if tag == "script":
            self.scripts += 1
        if tag in ("script", "style"):
            self._silent = True
        if "plot" in classes and "id" in attributes:
            self._current = attributes["id"]
            self.plots[self._current], self.figures[self._current] = attributes, 0
        if tag == "svg" and "main-svg" in classes and self._current:
            self.figures[self._current] += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._silent = False

    def handle_data(self, data):
        if not self._silent:
            self.words.append(data)
