"""Style and scripts of the report's page; nothing in them comes from data."""

from .plots_style import FONT

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1f2933; font: 16px/1.55 FONT; -webkit-text-size-adjust: 100%; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 21px; line-height: 1.3; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 span { color: #5f6b76; font-weight: 400; margin-right: 10px; }
h3 { font-size: 15px; margin: 18px 0 4px; overflow-wrap: anywhere; }
h3 .small { font-weight: 400; margin-left: 6px; }
p { margin: 0 0 12px; max-width: 88ch; overflow-wrap: anywhere; }
a { color: #00559b; }
b, i, bdi, h3, td, th, option, summary { unicode-bidi: isolate; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
section, nav, .card { background: #fff; border: 1px solid #e4e8ec; border-radius: 8px; padding: 22px 24px;
  margin: 18px 0; }
nav h2 { font-size: 15px; margin: 0 0 6px; }
nav ol { margin: 0; padding-left: 22px; columns: 2; column-gap: 40px; }
nav li { break-inside: avoid; padding: 1px 0; }
.sub { color: #5f6b76; }
.findings { border-left: 4px solid #0072B2; }
.findings ul { margin: 0; padding-left: 20px; }
.findings li { margin: 6px 0; max-width: 88ch; overflow-wrap: anywhere; }
figure { margin: 16px 0 8px; }
.plot { width: 100%; }
.broken { min-height: 0 !important; padding: 16px; border: 1px solid #D55E00; border-radius: 6px; color: #8a3c00; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 14px 0 6px; padding: 10px 0 0;
  border-top: 1px solid #e4e8ec; font-size: 13px; }
.facts div { max-width: 56ch; }
.facts dt { color: #5f6b76; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 10px 0 0; }
summary { cursor: pointer; font-size: 14px; color: #00559b; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 420px; margin: 8px 0; border: 1px solid #e4e8ec; border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: left; white-space: nowrap; border-bottom: 1px solid #eef1f4; }
td { max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
.wrap td { white-space: normal; overflow-wrap: anywhere; min-width: 110px; vertical-align: top; }
th { position: sticky; top: 0; background: #f6f7f9; font-weight: 600; }
.n { text-align: right; }
.small { font-size: 13px; color: #5f6b76; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 24px; margin: 12px 0; font-size: 14px; }
.controls select { font: inherit; padding: 3px 6px; max-width: 260px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 8px 0; font-size: 13px; min-height: 26px; }
.legend span { padding: 1px 7px; border-radius: 4px; }
.tokens { font: 14px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0 0 6px;
  max-width: none; overflow-wrap: anywhere; white-space: normal; }
.tokens i { font-style: normal; white-space: break-spaces; padding: 2px 1px; border-radius: 2px; }
.tokens.ids i { margin-right: 5px; padding: 2px 3px; }
.c0 { background: #9cc9e8; } .c1 { background: #f0b48a; } .c2 { background: #8fd3bb; } .c3 { background: #e8c4d8; }
.c4 { background: #cbe7f8; } .c5 { background: #f6dc9a; }
.c6 { background: #3f4a54; color: #fff; } .c7 { background: #f0f2f4; }
@media (max-width: 900px) { main { padding: 20px 12px 40px; } section, nav, .card { padding: 16px 14px; }
  h1 { font-size: 25px; } }
@media (max-width: 640px) { nav ol { columns: 1; } }
@media print { .modebar, nav, .controls, details:not([open]) { display: none !important; } body { background: #fff; }
  .scroll { max-height: none; overflow: visible; } main { max-width: none; padding: 0; }
  section, .card { border: 0; padding: 8px 0; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
""".replace("FONT", FONT)

# Draws the figures one after the other, so that the page can be scrolled meanwhile. Leaves on each figure how many of
# its traces plotly drew, and on the page how many figures: what a test can check.
DRAW = """
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  const settings = {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  let drawn = 0;
  for (const plot of plots) {
    try {
      const spec = JSON.parse(plot.parentElement.querySelector("script.spec").textContent);
      await Plotly.newPlot(plot, spec.data, spec.layout, settings);
      const visible = spec.data.filter((trace) => trace.visible !== false).length;
      const marks = ".main-svg .scatterlayer > .trace, .main-svg .barlayer > .trace, .main-svg .hm";
      const seen = plot.querySelectorAll(marks).length;
      plot.dataset.traces = seen + "/" + visible;
      if (visible === 0 || seen < visible) throw new Error(seen + " of " + visible + " traces were drawn");
      drawn += 1;
    } catch (error) {
      plot.classList.add("broken");
      plot.textContent = "This figure could not be drawn: " + error.message;
      console.error("figure " + plot.id + ": " + error.message);
    }
    await new Promise((next) => setTimeout(next, 0));
  }
  const root = document.documentElement;
  document.body.dataset.overflow = root.scrollWidth - root.clientWidth;
  document.body.dataset.rendered = drawn + "/" + plots.length;
  addEventListener("beforeprint", () => plots.forEach((plot) => plot.data && Plotly.Plots.resize(plot)));
})();
"""

# Colours each token by the expert that the router ranked first in the chosen layer of the chosen run.
PAINT = """
(() => {
  const shown = 7;
  const { runs } = JSON.parse(document.getElementById("painted").textContent);
  const chooseRun = document.getElementById("choose-run"), chooseLayer = document.getElementById("choose-layer");
  const legend = document.getElementById("token-legend");
  const unpack = (text) => new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  for (const run of runs) for (const doc of run.documents) doc.first = unpack(doc.first);
  const paint = () => {
    const chosen = Number(chooseRun.value), layer = Number(chooseLayer.value), count = new Map();
    let total = 0;
    for (const doc of runs[chosen].documents)
      for (let t = 0; t < doc.tokens; t++) {
        const expert = doc.first[layer * doc.tokens + t];
        count.set(expert, (count.get(expert) || 0) + 1);
        total += 1;
      }
    const top = [...count].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, shown).map((pair) => pair[0]);
    legend.replaceChildren(...top.map((expert, place) => {
      const item = document.createElement("span");
      item.className = "c" + place;
      item.textContent = "expert " + expert + " · " + Math.round((100 * count.get(expert)) / total) + " %";
      return item;
    }));
    if (count.size > top.length) {
      const rest = document.createElement("span");
      rest.className = "c7";
      rest.textContent = (count.size - top.length) + " other experts";
      legend.append(rest);
    }
    document.querySelectorAll(".examples").forEach((box) => { box.hidden = Number(box.dataset.run) !== chosen; });
    document.querySelectorAll('.examples[data-run="' + chosen + '"] .tokens').forEach((line, place) => {
      const doc = runs[chosen].documents[place];
      [...line.children].forEach((token, t) => {
        const expert = doc.first[layer * doc.tokens + t], rank = top.indexOf(expert);
        token.className = "c" + (rank < 0 ? 7 : rank);
        token.title = "token " + t + ": expert " + expert;
      });
    });
    document.body.dataset.painted = total;
  };
  chooseRun.addEventListener("change", paint);
  chooseLayer.addEventListener("change", paint);
  paint();
})();
"""
