from __future__ import annotations

import builtins
import datetime
import json
import os
import re
from html.parser import HTMLParser

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare_runs, read_run, report_html, write_report

MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
NASTY = "</title><script>alert(1)</script>\"><img src=x onerror='a'>&amp;{}$x$\x00\x1b"


class Page(HTMLParser):
    """Reads a page, complains about tags that do not match, and keeps what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.problems, self.tags = [], [], []
        self.ids, self.data, self.text = [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"not closed: {tag}" for tag in self.stack]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if len(dict(attrs)) != len(attrs):
            self.problems.append(f"attribute twice in {tag}")
        if tag == "data":
            self.data.append(float(dict(attrs)["value"]))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.stack or self.stack[-1] != tag:
            self.problems.append(f"</{tag}> within {self.stack[-3:]} at {self.getpos()}")
        else:
            self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def _report(*paths, **options):
    return report_html(compare_runs([read_run(path) for path in paths]), **options)


@pytest.fixture
def five_runs(demo_runs, make_run):
    return [
        *demo_runs,
        make_run("live", name="still going", until=97, summary=False, **MIDAS),
        make_run("odd", name="other data", compare={"data_digest": "77aa0b2c99"}),
    ]


def test_tags_match_and_identifiers_are_unique(five_runs):
    page = Page(_report(*five_runs))
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids)) > 0


def test_every_reference_is_within_the_page(five_runs):
    text = _report(*five_runs)
    page = Page(text)
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            value = attrs.get(name)
            assert value is None or (value[0] == "#" and value[1:] in page.ids), (tag, value)
    for place in re.findall(r"url\(([^)]*)\)", text):
        assert place[0] == "#" and place[1:] in page.ids
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags} == set()


def test_figures_are_drawn_and_named(five_runs):
    page = Page(_report(*five_runs))
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "plot"]
    assert len(plots) == 8 and all(len(attrs["aria-label"]) > 20 for attrs in plots)
    for title in ("Loss against steps", "Loss against model FLOPs", "Loss against training time",
                  "Loss against wall time", "Learning rate", "Depth over the run"):  # fmt: skip
        assert title in page.words


def test_the_page_is_small(five_runs):
    assert len(_report(*five_runs).encode()) < 1_500_000


def test_the_page_of_many_long_runs_is_small(make_run):
    paths = [make_run(f"m{i}", steps=(4000,)) for i in range(10)]
    assert len(_report(*paths).encode()) < 1_500_000


def test_tables_hold_the_exact_numbers_of_the_summaries(demo_runs):
    page = Page(_report(*demo_runs))
    for path in demo_runs:
        summary = json.loads((path / "summary.json").read_text())
        for key in ("eval_loss", "bits_per_byte", "tokens", "model_flops", "train_seconds",
                    "wall_seconds", "compile_seconds", "final_step", "params"):  # fmt: skip
            assert float(summary[key]) in page.data, key
        for stage in summary["stages"]:
            assert stage["seconds"] in page.data and stage["model_flops"] in page.data
    runs = [read_run(path) for path in demo_runs]
    assert runs[1].train_seconds / runs[0].train_seconds in page.data


def test_stages_tell_the_losses_at_their_ends(make_run):
    path = make_run("drawn", depths=(4, 8), steps=(10, 20))
    summary = json.loads((path / "summary.json").read_text())
    losses = ({"last_loss": 3.125, "eval_loss": 3.0625}, {"first_loss": 3.5, "eval_loss": 2.75})
    for stage, more in zip(summary["stages"], losses, strict=True):
        stage.update(more)
    (path / "summary.json").write_text(json.dumps(summary))
    plan = json.loads((path / "plan.json").read_text())
    plan["stages"][0]["run_depth"] = 53
    (path / "plan.json").write_text(json.dumps(plan))
    page = Page(_report(path))
    assert {3.125, 3.0625, 3.5, 2.75, 53.0} <= set(page.data) and not page.problems


def test_marks_notes_and_settings_that_differ(five_runs):
    text = _report(*five_runs)
    page = Page(text)
    badges = re.findall(r'<span class="badge">([^<]*)</span>', text)
    assert set(badges) == {"unfinished at step 97", "not comparable"}
    assert "not comparable: data digest 77aa0b2c, but 9f2c4be1 in MIDAS PROP-2" in page.words
    assert "One seed per arm" in page.words
    differing = re.findall(r'<tr class="differs"><th scope="row"><code>(.*?)</code>', text)
    differing = [key.replace("<wbr>", "") for key in differing]
    assert "train.steps" in differing and "growth.schedule" in differing
    assert "model.d_model" not in differing
    assert "settings that are the same in all runs" in page.words


@pytest.mark.parametrize("where", ["name", "method", "comparability", "config", "versions"])
def test_whatever_a_run_says_is_text(make_run, where):
    path = make_run("a", **MIDAS)
    summary = json.loads((path / "summary.json").read_text())
    config = json.loads((path / "config.json").read_text())
    if where in ("name", "method"):
        summary[where] = NASTY
    elif where == "versions":
        summary["versions"] = {NASTY: NASTY}
    elif where == "comparability":
        summary["comparability"]["optimizer"] = NASTY
    else:
        config["data"][NASTY] = [NASTY]
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.json").write_text(json.dumps(config))
    text = _report(make_run("b"), make_run("c"), path)
    page = Page(text)
    assert page.problems == [] and "alert(1)" in page.words
    assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "\x00" not in text and "\x1b" not in text


def test_a_map_is_shown_layer_by_layer(make_run):
    text = _report(make_run("midas", **MIDAS))
    shown = re.findall(r'<div class="layers">(.*?)</div>', text)
    assert [re.findall(r">(\d+)<", cells) for cells in shown] == [
        ["0", "1", "0", "1"],
        ["0", "1", "0", "1", "2", "3"],
        ["0", "1", "2", "3", "2", "3", "4", "5"],
    ]
    assert re.findall(r'class="copy">(\d+)<', shown[2]) == ["2", "3"]


def test_a_layer_without_a_source_is_a_plus(make_run):
    path = make_run("new", **MIDAS)
    text = (path / "metrics.jsonl").read_text().replace(
        "[0, 1, 2, 3, 2, 3, 4, 5]", "[0, 1, -1, 2, 3, 4, 5, -1]"
    )
    (path / "metrics.jsonl").write_text(text)
    shown = re.findall(r'<div class="layers">(.*?)</div>', _report(path))
    assert re.findall(r">(\d+|\+)<", shown[2]) == ["0", "1", "+", "2", "3", "4", "5", "+"]
    assert 'class="copy"' not in shown[2] and shown[2].count('class="new"') == 2


def test_command_and_date_are_in_the_page(make_run):
    now = datetime.datetime(2031, 2, 3, 4, 5, tzinfo=datetime.UTC)
    page = Page(_report(make_run("a"), command="stacking-jax compare 'a b'", now=now))
    assert "stacking-jax compare 'a b'" in page.words
    assert "2031-02-03 04:05 UTC" in page.words and "jax 0.10.2" in page.words


def test_runs_with_nothing_in_them_yet(make_run):
    path = make_run("new", summary=False)
    (path / "metrics.jsonl").write_text("")
    assert Page(_report(path)).problems == []
    assert Page(_report(path, make_run("b"))).problems == []


def test_losses_that_are_not_numbers(make_run):
    path = make_run("diverged", until=60, summary=False)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[30:]:
        for key in {"loss", "eval_loss", "bits_per_byte"} & row.keys():
            row[key] = float("nan")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(_report(path, make_run("b")))
    assert page.problems == [] and page.words.count("NaN") == 2, "nats per token, bits per byte"


def test_values_of_an_unexpected_kind_are_shown_or_left_out(make_run):
    path = make_run("odd", **MIDAS)
    plan = json.loads((path / "plan.json").read_text())
    plan["stages"][0].update(depth="two", steps=None, params=[], tokens={}, map="0 1")
    (path / "plan.json").write_text(json.dumps(plan))
    assert Page(_report(path)).problems == []


def test_writing_replaces_whole_files_only(make_run, tmp_path, monkeypatch):
    comparison = compare_runs([read_run(make_run("a"))])
    out = tmp_path / "deep" / "report.html"
    assert write_report(comparison, out) == out
    assert Page(out.read_text(encoding="utf-8")).problems == []
    out.write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            write_report(comparison, out)
    assert out.read_text() == "old" and os.listdir(out.parent) == ["report.html"]
    write_report(comparison, out)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_place_that_cannot_be_written(make_run, tmp_path):
    comparison = compare_runs([read_run(make_run("a"))])
    with pytest.raises(UserError, match="is a directory"):
        write_report(comparison, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(comparison, tmp_path / "file" / "report.html")


def test_without_matplotlib_the_error_says_what_to_do(make_run, monkeypatch):
    comparison = compare_runs([read_run(make_run("a"))])
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="need matplotlib.*install"):
        report_html(comparison)
