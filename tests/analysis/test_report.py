"""The report: what it says, that a browser draws it, that data stay data."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from omnigene_fast import analysis
from omnigene_fast.analysis import plots, report_page, report_sections, report_words
from omnigene_fast.analysis.coactivation import flow
from omnigene_fast.analysis.decomposition import decompose
from omnigene_fast.analysis.divergence import differentiation, divergence, divergence_summary
from omnigene_fast.analysis.load import load
from omnigene_fast.analysis.report import report
from omnigene_fast.analysis.report_page import in_script, number, safe
from omnigene_fast.analysis.report_tables import strongest
from omnigene_fast.analysis.specialty import specialty
from omnigene_fast.tracing.counting import count_picks
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from .audited import KIN, audited
from .browser import look

SETTINGS = {"permutations": 19, "progress": False}
FIGURES = ["experts", "divergence", "layers", "stages", "tree", "paths", "load"]
STAGES = (("base", 0.5), ("cpt", 1.0), ("sft", 1.1))


def runs(count=3, **settings):
    return [audited(name, strength=strength, **settings) for name, strength in STAGES[:count]]


def section(text, anchor):
    return re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL).group()


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Base, CPT and SFT over the twelve families."""
    folder = tmp_path_factory.mktemp("twelve")
    return report(
        runs(groups=tuple(KIN), documents=3, layers=5, experts=32, top_k=4), folder / "audit.html", **SETTINGS
    )


@pytest.mark.parametrize("width", [1440, 800])
def test_a_browser_draws_every_figure(twelve, width, tmp_path):
    seen = look(twelve, width, tmp_path, audit=True)
    seen.assert_sound(len(FIGURES))
    assert list(seen.plots) == [f"plot-{name}" for name in FIGURES]
    assert seen.faults == []
    assert int(seen.body["data-painted"]) > 0


def test_the_browser_check_sees_what_is_broken(tmp_path, monkeypatch):
    import plotly.graph_objects as go

    nothing = go.Figure(go.Scatter(x=[], y=[]), layout={"height": 200})
    crowded = go.Figure(go.Scatter(x=[1, 2], y=[1, 2]), layout={"height": 300})
    for words in ("one above", "the other"):
        crowded.add_annotation(text=words, x=1.5, y=1.5, showarrow=False)
    monkeypatch.setattr(plots, "task_tree", lambda table: nothing)
    monkeypatch.setattr(plots, "differentiation_curves", lambda table: crowded)
    path = report(runs(1), tmp_path / "broken.html", **SETTINGS)
    text = path.read_text()
    path.write_text(text.replace('{"data":', '{"data":!', 1))
    seen = look(path, 800, tmp_path, audit=True)
    with pytest.raises(AssertionError):
        seen.assert_sound(6)
    assert seen.body["data-rendered"] == "4/6"
    assert len(seen.errors) == 2
    assert "plot-experts" in seen.errors[0]
    assert "plot-tree" in seen.errors[1]
    assert any("one above" in fault and "the other" in fault for fault in seen.faults)


def test_labels_names_and_texts_stay_text(tmp_path):
    owned = "document.body.dataset.owned=1"
    hostile = [
        "<script>alert(1)</script>",
        '"></svg><svg onload=' + owned + ">",
        "../../x",
        "';DROP TABLE tokens;--",
        f"</script><script>{owned}</script>",
        f'<a href="javascript:{owned}">%{{x}} $x^2$</a>',
        "=1+1&lt;b&gt;",
    ]
    run = audited(groups=hostile, documents=2)
    other = audited(groups=hostile, documents=2, strength=0.2)
    run.name, other.name = f"<img src=x onerror={owned}>", "../../evil"
    run.meta |= {"model": f"<img src=x onerror={owned}>", "versions": {"<i>": "</script>"}, "created": "<u>"}
    texts = {token: f"<img src=y onerror={owned}>" for token in range(300)}
    path = report([other, run], tmp_path / "in" / "hostile.html", texts=texts, **SETTINGS)
    assert {one.relative_to(tmp_path).parts[0] for one in tmp_path.rglob("*")} == {"in"}
    assert {one.name for one in path.parent.iterdir()} == {"hostile.html", "hostile_data"}
    assert all(re.fullmatch("[a-z_]+[.]csv", one.name) for one in (path.parent / "hostile_data").iterdir())
    seen = look(path, 800, tmp_path, audit=True)  # the copy has no policy: escaping alone protects it
    assert "data-owned" not in seen.body
    seen.assert_sound(len(FIGURES))
    assert seen.faults == []
    assert seen.scripts == len(FIGURES) + 5  # specs; what is painted; plotly, drawing, painting; the audit
    for label in hostile:
        assert label in seen.text
    assert set(pd.read_csv(path.parent / "hostile_data" / "load.csv")["group"]) == set(hostile)


def test_no_name_or_token_turns_the_text_after_it_around(tmp_path):
    turning = ["a\u202eb", "c\u2069\u202ed", "e\u2067f"]
    run = audited("x\u202ey", groups=turning)
    path = report(run, tmp_path / "r.html", texts=lambda token: "t\u202eu", **SETTINGS)
    text = path.read_text()
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    specs = re.findall(r'class="spec">(.*?)</script>', text)
    assert not any(re.search(r"(?<!\\)\\u20(2[a-e]|6[6-9])", spec) for spec in specs)
    assert "<i>t\\u202eu</i>" in text
    assert "<b>c\\u2069\\u202ed</b>" in text
    assert re.search(r"b, i,[^{}]*\{ unicode-bidi: isolate; \}", text)  # names in a script that runs right to left
    assert set(pd.read_csv(tmp_path / "r_data" / "load.csv")["group"]) == set(turning)


def test_nothing_is_loaded_from_elsewhere(twelve, tmp_path):
    text = twelve.read_text()
    head = text[: text.index("<body>")]
    assert "default-src 'none'" in head
    assert "unsafe-inline'; img" in head  # styles alone
    assert "script-src 'sha256-" in head
    assert not re.search(r"<(script|img|iframe|link)[^>]*\s(src|href)=", text.replace("\n", " ")[: len(head) + 200])
    look(twelve, 800, tmp_path).assert_sound(len(FIGURES))  # under its own policy
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert set(re.findall(r'(?:src|href)="(https?://[^/"]+)', markup)) == {"https://arxiv.org"}


def test_csv_files_equal_the_tables(tmp_path):
    three = runs()
    path = report(three, tmp_path / "a b.html", seed=3, **SETTINGS)
    folder = tmp_path / "a b_data"
    many = {"permutations": 19, "seed": 3}
    expected = {
        "load": lambda run: load(run),
        "specialty": lambda run: specialty(run),
        "divergence": lambda run: divergence_summary(run, **many),
        "divergence_by_layer": lambda run: divergence(run, **many),
        "differentiation": lambda run: differentiation(run, **many),
        "flow": lambda run: flow(run).assign(share=lambda t: t["tokens"] / run.documents["n_tokens"].sum()),
    }
    for name, measure in expected.items():
        table = pd.concat([measure(run).assign(run=run.name) for run in three], ignore_index=True)
        table = table[["run", *table.columns[:-1]]]
        found = pd.read_csv(folder / f"{name}.csv")
        pd.testing.assert_frame_equal(found, _as_read(table), check_dtype=False, rtol=1e-14)
    found = pd.read_csv(folder / "decomposition.csv")
    table = decompose(*three, per_layer=True, **many)
    pd.testing.assert_frame_equal(found, _as_read(table), check_dtype=False, rtol=1e-14)
    links = set(re.findall(r'href="(a%20b_data/[^"]+)"', path.read_text()))
    assert links == {f"a%20b_data/{one.name}" for one in folder.iterdir()}


def _as_read(table):
    return table.assign(layer=table["layer"].astype(str)) if table.get("layer", pd.Series(0)).dtype == object else table


def test_words_carry_the_numbers(twelve):
    text = twelve.read_text()
    pairs = pd.read_csv(twelve.parent / "audit_data" / "divergence.csv")
    pairs = pairs[pairs["run"] == "sft"].sort_values("corrected")
    for row in (pairs.iloc[0], pairs.iloc[-1]):
        words = (
            f"<b>{row['a']}</b> and <b>{row['b']}</b>, {row['corrected']:.3f} nats [{row['low']:.3f},"
            f" {row['high']:.3f}], p = {row['p_value']:.2g}"
        )
        assert words in section(text, "divergence")
        assert words in text[: text.index("<nav")]  # the key findings
    assert "(permutations=) are too few to tell any pair of tasks apart (no q could be below 0.05)." in text
    findings = re.search("<div class='card findings'>.*?</div>", text, re.DOTALL).group()
    assert 3 <= findings.count("<li>") <= 6
    for anchor in FIGURES:
        part = section(text, anchor)
        assert "<dt>Unit</dt>" in part
        assert "<dt>n</dt>" in part
        assert "<dt>Interval" in part
        assert "<dt>Data</dt>" in part


def spec(text, anchor):
    return json.loads(re.search(r'class="spec">(.*?)</script>', section(text, anchor)).group(1))


def test_a_pair_that_is_not_told_apart_is_said_to_be(tmp_path):
    """Three groups of the same counts: no pair differs, and the corrected values are below 0."""
    run = audited(groups=("a", "b", "c"), documents=8)
    run.counts = np.concatenate([run.counts[:8]] * 3)
    text = report(run, tmp_path / "same.html", permutations=199, progress=False).read_text()
    assert "None of the 3 pairs of tasks are told apart (q &lt; 0.05 among all pairs)." in text
    assert [trace["name"] for trace in spec(text, "divergence")["data"]] == ["base, not told apart"]
    assert "No expert of <b>base</b> is preferred" in text


def test_told_apart_allows_for_the_number_of_pairs(twelve, tmp_path, monkeypatch):
    """Words and cells follow the q-value: two of three pairs, one of which is above its floor by chance."""
    asked = report_words.tested

    def chance(t, run):
        return asked(t, run).assign(p_value=[0.04, 0.01, 0.01], q_value=[0.06, 0.015, 0.015])

    monkeypatch.setattr(report_words, "tested", chance)
    monkeypatch.setattr(report_sections, "tested", chance)
    text = report(runs(1), tmp_path / "r.html", permutations=199, progress=False).read_text()
    assert "2 of the 3 pairs of tasks are told apart" in text
    assert [trace["name"] for trace in spec(text, "divergence")["data"]] == ["base", "base, not told apart"]
    # With 19 worlds no q can be below the level: no cell is grey, whatever its value.
    assert [trace["name"] for trace in spec(twelve.read_text(), "divergence")["data"]] == ["base", "cpt", "sft"]


def test_whether_a_difference_can_be_seen_at_all(tmp_path):
    def least(docs, permutations):
        return report_words.smallest_p(pd.DataFrame([docs], columns=["docs_a", "docs_b"]), permutations)[0]

    assert least((50, 50), 999) == pytest.approx(0.001)
    assert least((3, 3), 999) == pytest.approx(2 / 2**6)  # sides of six documents, all of which may be turned
    assert least((1, 1), 999) == 0.5
    text = report(audited(documents=2), tmp_path / "r.html", permutations=199, progress=False).read_text()
    assert "The documents are too few to tell any pair of tasks apart" in text


@pytest.mark.parametrize("count", [2, 3])
def test_training_that_changed_nothing(count, tmp_path):
    """Infinite ends of the shares' intervals are no bound, and a change of 0 has no sign."""
    text = report([audited()] * count, tmp_path / "same.html", **SETTINGS).read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", "".join(re.findall(r'class="spec">(.*?)</script>', text)))
    part = section(text, "stages")
    assert "from <b>base</b> to <b>base (2)</b> by 0.000 nats [0.000, 0.000]" in part
    no_bound = (
        "The total change of the mean divergence and mean distance cannot be told from 0: shares of it have no bound"
    )
    assert (no_bound in part) == (count == 3)
    assert "<td class=n>–</td>" in part
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"-0(\.0*)?(?![.\d])|\binf\b", re.sub(r"<[^>]*>", " ", markup.split("<nav")[1]))


def test_shares_are_the_corrected_ones(tmp_path):
    three = [audited(str(taste), strength=taste, documents=3, layers=2, experts=8) for taste in (0.5, 0.8, 1.3)]
    part = section(report(three, tmp_path / "r.html", **SETTINGS).read_text(), "stages")
    table = decompose(*three, permutations=0)
    for _, both in table.groupby("convention"):
        first, second = (100 * both["share_corrected"]).tolist()
        assert abs(first - 100 * both["share"].iloc[0]) > 0.1  # the plug-in share reads differently
        low, high = 100 * both[["share_low", "share_high"]].iloc[1]
        assert f"{first:.1f} % and {second:.1f} % [{low:.1f} %, {high:.1f} %]" in part


def test_words_of_the_strongest_preference_stay_within_the_ceiling(tmp_path):
    run = audited(strength=4.0)
    part = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "experts")
    table = specialty(run)
    best = table[(table["q_value"] < 0.05) & (table["low"] > 0)].sort_values("low", ascending=False, kind="stable")
    assert best["high"].max() > math.log(3)
    row = best.iloc[0]
    value, low, high = (min(row[name], math.log(3)) for name in ("corrected", "low", "high"))
    assert f"(specialty {value:.2f} nats [{low:.2f}, {high:.2f}], at most ln 3 = 1.10)" in part
    rows = re.findall(r"<tr>(.*?)</tr>", part)[1:]
    shown = [[float(cell) for cell in re.findall("<td class=n>([^<]*)</td>", line)[4:7]] for line in rows]
    assert max(max(one) for one in shown) <= 1.099


def evenly(run, row, among):
    run.counts[row] = 0
    run.counts[row, :, :among] = 240 // among


def test_an_order_of_the_groups_needs_intervals_that_do_not_meet(tmp_path):
    run = audited(groups=("a", "b", "c"), documents=6)
    documents = {group: np.flatnonzero(run.documents["task"] == group) for group in "abc"}
    for group, few, many in (("a", 4, 5), ("b", 10, 12), ("c", 8, 12)):
        for place, row in enumerate(documents[group]):
            evenly(run, row, many if place % 2 else few)
    part = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "load")
    value = r"\d+\.\d \[\d+\.\d, \d+\.\d\]"
    order = rf"<b>a</b> is routed most narrowly, over {value} effective experts of 16.*most widely, over {value}\."
    assert re.search(order, part)
    # The same taste in all groups: no order, and the ends of the intervals.
    for group in "abc":
        for place, row in enumerate(documents[group]):
            evenly(run, row, 12 if place % 2 else 6)
    part = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "load")
    assert "most widely" not in part
    assert re.search(r"all tasks use between \d+\.\d and \d+\.\d effective experts of 16", part)


def test_a_group_of_one_document_takes_no_part_in_the_order(tmp_path):
    """Its documents are too few to correct by, and what is uncorrected is too narrow."""
    run = audited(groups=("a", "b", "c"), documents=6)
    alone = np.flatnonzero(run.documents["task"] == "c")
    run.documents.loc[alone[1:], "task"] = None
    part = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "load")
    assert "1 task is left out, with too few documents for an interval." in part
    assert "Too few documents to correct by, so shown as measured: <b>c</b> of <b>base</b>." in part
    assert "<b>c</b> is routed" not in part


def test_load_is_corrected_but_for_the_maximum_and_within_bounds(tmp_path):
    run = audited(strength=0.0, documents=4, tokens=12)
    report(run, tmp_path / "r.html", **SETTINGS)
    part = section((tmp_path / "r.html").read_text(), "load")
    table = load(run)
    mean = table.groupby("group")[["cv_corrected", "gini_corrected", "max_vio", "max_vio_corrected"]].mean()
    assert (mean["max_vio"] - mean["max_vio_corrected"]).abs().min() > 1e-3
    for group, row in mean.iterrows():
        cells = re.search(rf"<td>{group}</td>(.*?)</tr>", part).group(1)
        numbers = [float(one) for one in re.findall("<td class=n>([^<]*)</td>", cells)]
        assert numbers[2:5] == pytest.approx([row["cv_corrected"], row["max_vio"], row["gini_corrected"]], rel=1e-3)
        assert max(numbers[7:]) <= 16
    assert "MaxVio and the dead fraction are shown as measured" in part
    sizes = pd.read_csv(tmp_path / "r_data" / "sizes.csv")
    by_layer = table.groupby("group", sort=False)
    assert sizes["effective_experts"].to_numpy() == pytest.approx(by_layer["effective_experts"].mean().to_numpy())
    # A document is left out of all layers at once, so the interval of the mean is no wider than the mean of intervals.
    width = sizes["effective_experts_high"] - sizes["effective_experts_low"]
    widths = (by_layer["entropy_high"].mean() - by_layer["entropy_low"].mean()).to_numpy() * 16
    assert (width > 0).all()
    assert (width < widths).all()


def test_paths_of_the_last_run_that_has_tokens(tmp_path):
    first, last = audited("first"), audited("last")
    last.record, last.iter_documents, last.batches = (), None, None
    first.documents.loc[:5, "task"] = None  # flow counts the documents without the label too
    last.documents.loc[:5, "task"] = None
    part = section(report([first, last], tmp_path / "r.html", **SETTINGS).read_text(), "paths")
    assert re.search(r"In <b>first</b>, \w+ of the \d+ steps (is|are) taken more often than by chance", part)
    assert "Not shown, for want of records of tokens: <b>last</b>." in part
    assert f"<dd>{first.documents['n_tokens'].sum():,} tokens, those of all documents, in first</dd>" in part
    assert "Lift is over all documents pooled" in part


def test_two_runs_show_the_change(tmp_path):
    text = report(runs(2), tmp_path / "two.html", **SETTINGS).read_text()
    part = section(text, "stages")
    table = decompose(*runs(2), runs(2)[1], permutations=19).query("stage == 'd_cpt' and convention == 'divergence'")
    row = table.iloc[0]
    change = f"from <b>base</b> to <b>cpt</b> by {row['corrected']:.3f} nats [{row['low']:.3f}, {row['high']:.3f}]"
    assert change in part
    assert "SFT" not in part
    assert "d_sft" not in part
    assert "19 worlds without a difference (permutations=) are too few to tell any pair of tasks apart" in section(
        text, "divergence"
    )


def test_runs_that_cannot_be_paired_are_shown_without_a_change(tmp_path):
    text = report([*runs(1), audited("later", documents=9)], tmp_path / "two.html", **SETTINGS).read_text()
    assert "cannot be paired by document" in section(text, "stages")
    assert 'class="plot"' not in section(text, "stages")


def test_one_run_one_task_no_tokens(tmp_path):
    """What is missing is a sentence, never an empty figure."""
    run = audited(groups=("protein",))
    run.record, run.iter_documents, run.batches = (), None, None
    path = report(run, tmp_path / "one.html", **SETTINGS)
    text = path.read_text()
    for anchor in ("divergence", "layers", "stages", "tree"):
        assert "at least two values of the label" in section(text, anchor)
    for anchor in ("paths", "tokens"):
        assert "no records of tokens" in section(text, anchor)
    look(path, 800, tmp_path).assert_sound(2)
    assert {one.name for one in (tmp_path / "one_data").iterdir()} == {"load.csv", "sizes.csv", "specialty.csv"}


def test_two_tasks_of_one_document_each(tmp_path):
    """Nothing to leave out, so no interval: said, and no NaN on the page."""
    run = audited(groups=("protein", "cell"), documents=1)
    text = report(run, tmp_path / "thin.html", **SETTINGS).read_text()
    assert "too few documents for an interval" in text
    assert "a tree needs at least three" in section(text, "tree").lower()
    assert not re.search(r">[^<]*\bnan\b", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL), re.IGNORECASE)


def test_no_permutations_no_floor(tmp_path):
    text = report(runs(1), tmp_path / "r.html", permutations=0, progress=False).read_text()
    assert "No noise floor was computed (permutations=0), so that no difference was tested." in text
    assert "noise floor" not in section(text, "layers").split("<dl")[0]
    assert "Here no worlds were made" in section(text, "method")


def test_tokens_are_shown_as_bytes_texts_or_ids(tmp_path):
    run = audited(groups=("protein", "cell"), documents=2)
    run.records.token[:2] = [3 + 10, 3 + 0xC3]
    part = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "tokens")
    assert "<i>⏎</i><i>\\xc3</i>" in part
    first = [chr(token - 3) for token in run.records.token[2:10]]
    assert "".join(f"<i>{letter}</i>" for letter in first) in part
    told = section(report(run, tmp_path / "r.html", texts=lambda i: f"w{i}", **SETTINGS).read_text(), "tokens")
    assert "".join(f"<i>w{token}</i>" for token in run.records.token[:10]) in told
    del run.meta["tokenizer"]
    ids = section(report(run, tmp_path / "r.html", **SETTINGS).read_text(), "tokens")
    assert "".join(f"<i>{token}</i>" for token in run.records.token[:10]) in ids
    assert "The numbers are token ids" in ids


def test_the_expert_of_a_token_is_the_first_of_its_document_and_layer(tmp_path):
    run = audited(documents=3)
    report(run, tmp_path / "r.html", **SETTINGS)
    table = pd.read_csv(tmp_path / "r_data" / "tokens.csv")
    assert list(table.drop_duplicates("doc_id")["group"]) == ["dna_coding", "protein", "text_general"]
    for doc, rows in table.groupby("doc_id"):
        mine = run.records.take(run.records.doc == doc)
        assert (rows["token_id"].to_numpy() == mine.token[: len(rows)]).all()
        columns = [f"layer_{layer}" for layer in run.layers]
        assert (rows[columns].to_numpy() == mine.ids[:, : len(rows), 0].T).all()


def test_a_stored_run_gives_the_report_of_the_same_run_in_memory(tmp_path):
    """Several segments, a document across two of them, labels with quotes."""
    run = audited(groups=("it's", 'a "cell"', "<i>"), documents=4)
    with Writer(tmp_path / "base", run.meta) as writer:
        for start in range(0, len(run.records), 90):
            part = run.records.take(slice(start, start + 90))
            labels = {int(doc): {"task": run.documents["task"][doc]} for doc in np.unique(part.doc)}
            writer.add(part, labels, {doc: run.documents["text_hash"][doc] for doc in labels})
            writer.commit()
    report(run, tmp_path / "memory.html", **SETTINGS)
    path = report(open_trace(tmp_path / "base"), tmp_path / "stored.html", **SETTINGS)
    for name in ("tokens", "divergence", "load", "flow", "specialty"):
        expected, found = (pd.read_csv(tmp_path / f"{kind}_data" / f"{name}.csv") for kind in ("memory", "stored"))
        pd.testing.assert_frame_equal(found, expected)
    assert str(tmp_path / "base") in path.read_text()


def test_what_is_asked_wrongly(tmp_path):
    with pytest.raises(ValueError, match=r"by: expected one of the labels \['task'\]"):
        report(runs(1), tmp_path / "r.html", by="species", **SETTINGS)
    with pytest.raises(ValueError, match="runs: expected at least one run"):
        report([], tmp_path / "r.html", **SETTINGS)
    with pytest.raises(ValueError, match="same values of 'task'"):
        report([audited(), audited(groups=("cell", "code"))], tmp_path / "r.html", **SETTINGS)
    with pytest.raises(ValueError, match="layers, experts and top-k"):
        report([audited(), audited(layers=3)], tmp_path / "r.html", **SETTINGS)
    with pytest.raises(ValueError, match=r"out: expected the name of an \.html file"):
        report(runs(1), tmp_path / "r.pdf", **SETTINGS)
    with pytest.raises(ValueError, match="permutations: expected an integer"):
        report(runs(1), tmp_path / "r.html", permutations=-1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    path, folder = tmp_path / "r.html", tmp_path / "r_data"
    report(runs(1), path, **SETTINGS)
    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    with monkeypatch.context() as broken:
        broken.setattr(report_page, "page", lambda *arguments, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report(runs(2), path, **SETTINGS)
    (folder / "load.csv.new").mkdir()  # a file that cannot be written
    with pytest.raises(OSError, match="load"):
        report(runs(2), path, **SETTINGS)
    (folder / "load.csv.new").rmdir()
    assert {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before


def test_a_report_leaves_no_data_of_the_one_before(tmp_path):
    folder = tmp_path / "r_data"
    report(runs(2), tmp_path / "r.html", **SETTINGS)
    assert {"decomposition.csv", "divergence.csv"} <= {one.name for one in folder.iterdir()}
    (folder / "mine.csv").write_text("kept")
    report(audited(groups=("protein",)), tmp_path / "r.html", **SETTINGS)
    assert {one.name for one in folder.iterdir()} == {
        "load.csv",
        "sizes.csv",
        "specialty.csv",
        "flow.csv",
        "tokens.csv",
        "mine.csv",
    }


def test_runs_of_one_name_are_told_apart(tmp_path):
    report([audited("x"), audited("x", strength=0.4)], tmp_path / "r.html", **SETTINGS)
    assert list(pd.read_csv(tmp_path / "r_data" / "sizes.csv")["run"].unique()) == ["x", "x (2)"]


def test_escaping():
    assert safe('<a href="\'">&') == "&lt;a href=&quot;&#x27;&quot;&gt;&amp;"
    text = in_script({"a": "</script><!--\u2028&"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"a": "</script><!--\u2028&"}
    assert [number(value) for value in (math.inf, -math.inf, -0.0, np.float32(-math.inf))] == ["–", "–", "0", "–"]
    assert [number(value) for value in (np.int64(12345), 0.123456, float("nan"), None, "a", 2.0)] == [
        "12,345",
        "0.1235",
        "",
        "",
        "a",
        "2",
    ]


def words_of(path):
    """The page's words, without tables and scripts."""
    text = re.sub(r"<(script|style|table).*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text))


def test_routers_that_have_collapsed(tmp_path):
    """No step or lift is known between experts that no token takes."""
    run = audited(groups=("protein", "code"), documents=5, experts=32, top_k=4)
    run.records.ids[[0, 2]] = np.arange(4, dtype=run.records.ids.dtype)
    run.counts = count_picks(run.records.ids, run.records.doc, len(run.documents), 32)
    path = report(run, tmp_path / "some.html", **SETTINGS)
    assert "In base every token goes to the same 4 experts in layers 0 and 2: such a router" in words_of(path)
    run.records.ids[:] = np.arange(4, dtype=run.records.ids.dtype)
    run.counts = count_picks(run.records.ids, run.records.doc, len(run.documents), 32)
    path = report(run, tmp_path / "all.html", **SETTINGS)
    assert "In base every token goes to the same 4 experts in every layer" in words_of(path)
    drawn = pd.read_csv(tmp_path / "all_data" / "flow.csv")
    assert (drawn["tokens"] == 0).any()
    assert strongest(drawn)["tokens"].min() > 0
    path = report(audited(groups=("protein", "code"), documents=5), tmp_path / "sound.html", **SETTINGS)
    assert "collapsed" not in words_of(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": ("protein",)},
        {"groups": ("protein",), "documents": 1, "layers": 1},
        {"groups": ("protein", "code"), "documents": 1, "layers": 2},
    ],
)
def test_one_of_anything_is_in_the_singular(settings, tmp_path):
    words = words_of(report(audited(**settings), tmp_path / "r.html", **SETTINGS))
    assert re.findall(r"\b1 (?:recorded )?(?:task|document|layer|pair|token|group|run|step)s\b", words) == []
    if len(settings["groups"]) == 1:
        assert "the tasks use" not in words
        assert "each task" not in words


def test_a_note_on_a_run_is_shown(tmp_path):
    run = audited(groups=("protein", "code"), documents=3)
    assert "<td>note</td>" not in report(run, tmp_path / "without.html", **SETTINGS).read_text()
    run.meta["note"] = "random <weights>"
    assert "random &lt;weights&gt;" in report(run, tmp_path / "with.html", **SETTINGS).read_text()


def test_a_label_with_too_many_values_is_refused_at_once(tmp_path):
    run = audited(groups=[f"family {number}" for number in range(51)], documents=1, tokens=4, layers=2)
    for measure in (analysis.divergence, analysis.divergence_summary, analysis.differentiation):
        with pytest.raises(ValueError, match=r"at most 50 values.*got 51 of 'task'.*coarser label"):
            measure(run, permutations=0)
    with pytest.raises(ValueError, match="at most 50 values"):
        report(run, tmp_path / "r.html", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    run.documents.loc[run.documents["task"] == "family 50", "task"] = None
    assert len(analysis.divergence_summary(run, permutations=0)) == 50 * 49 / 2
