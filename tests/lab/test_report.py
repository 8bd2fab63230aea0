"""The HTML report and its charts."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from normwise.lab.plots import PLOTS
from normwise.lab.report import render
from normwise.lab.report.curves import Comparison
from normwise.lab.summary import summarize

METHODS = ("sgd", "sgdp")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture
def run(run):
    return {
        **run,
        "command": "normwise compare --optimizers sgd,sgdp",
        "settings": {
            "optimizers": list(METHODS),
            "seeds": 2,
            "epochs": 2,
            "lr_sgd": 0.1,
            "drop_epochs": [1],
        },
    }


@pytest.fixture
def records(record):
    return [
        record(name, seed, epoch, norm_growth=1 + rate * epoch, test_accuracy=0.5 + 0.2 * epoch)
        for name, rate in (("sgd", 0.5), ("sgdp", 0.1))
        for seed in range(2)
        for epoch in range(3)
    ]


def shown(run, records):
    summary = summarize(records, run["methods"], 2, run["task"]["test_examples"])
    return render(run, records, summary)


def test_the_page_is_well_formed_and_shows_everything(run, records):
    page = Page(shown(run, records))
    assert page.open == []
    assert page.tags.count("figure") == 9  # six curves and three of the toy
    assert page.tags.count("svg") == 2 * 9  # for wide and narrow columns
    text = " ".join(page.words)
    assert "SGDP kept the norms smaller than SGD" in text
    assert run["command"] in text
    for digits in ("3.7258", "1.3491", ".0010", "2.93"):
        assert f"paper {digits}" in text
    assert "Layer by layer" not in text


def test_the_page_loads_nothing(run, records):
    html = shown(run, records)
    page = Page(html)
    loading = {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}
    assert [a for a in page.attributes if a[1] in loading] == []
    assert not re.search(r"https?://|@import|url\((?!#)|\bimport\s*\(|fetch\(", html)
    assert {"link", "img", "iframe", "object"}.isdisjoint(page.tags)


def test_what_is_not_ours_is_escaped(run, records, failure):
    bad = '</title></style><script>alert("x")</script>'
    run["task"]["title"] = run["task"]["source"] = run["command"] = bad
    run["methods"] = [{**m, "label": f"{m['label']} {bad}"} for m in run["methods"]]
    failed = {**failure("sgd", 1), "error": "<img src=x onerror=alert(1)>"}
    page = Page(shown(run, [*records, failed]))
    assert page.open == []
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert any(bad in words for words in page.words)


def test_what_the_pointer_shows_are_the_metrics(run, records):
    html = shown(run, records)
    first = json.loads(unescape(re.search(r'data-hover="(.*?)"', html)[1]))
    assert [line["label"] for line in first["lines"]] == ["SGD", "SGDP"]
    assert [point[2:] for point in first["lines"][0]["points"]] == [
        ["0", "×1.000"],
        ["1", "×1.500"],
        ["2", "×2.000"],
    ]


def test_the_band_is_from_the_lowest_to_the_highest_seed(run, record):
    records = [
        record("sgd", seed, epoch, norm_growth=growth)
        for seed, growths in enumerate(((1, 1.5, 2), (1, 1.7, 3)))
        for epoch, growth in enumerate(growths)
    ]
    (line, empty) = Comparison(run, records).chart("norm_growth").lines
    assert (line.y, line.low, line.high) == ((1, 1.6, 2.5), (1, 1.5, 2), (1, 1.7, 3))
    assert not empty.drawn


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_an_interrupted_run_says_so(run, records, status):
    html = shown({**run, "status": status}, records)
    assert ('class="notice"' in html) == (status == "interrupted")


def test_a_run_without_records_still_makes_a_page_and_pictures(run):
    stopped = {**run, "status": "interrupted"}
    page = Page(shown(stopped, []))
    assert page.open == []
    assert "No finished epoch to draw." in " ".join(page.words)
    assert page.tags.count("figure") == 3  # the toy's
    for plot in PLOTS.values():
        assert plot(stopped, []).startswith(b"\x89PNG")


def test_failed_runs_and_values_that_are_not_finite_are_survived(run, record, failure):
    records = [
        *(record("sgd", 0, epoch, train_loss=float("nan")) for epoch in range(3)),
        *(record("sgdp", 0, epoch) for epoch in range(2)),
        failure("sgdp", 0, 2),
    ]
    html = shown(run, records)
    assert Page(html).open == []
    assert "SGDP, seed 0: failed, the training loss became nan." in html
    assert not re.search(r'(points|cx|cy|[xy][12]?)="[^"]*(nan|inf)', html)


def test_twenty_methods_are_all_named_in_every_chart(run, record):
    names = [f"method {k}" for k in range(20)]
    run["settings"]["optimizers"] = names
    run["methods"] = [
        {"name": n, "label": n.title(), "update": "gradient", "baseline": None} for n in names
    ]
    records = [record(n, 0, e, norm_growth=1 + e * 0.001) for n in names for e in range(3)]
    html = render(run, records, {"headline": "Many", "optimizers": [], "findings": []})
    for name in names:
        # In six charts, each for two widths.
        assert len(re.findall(rf">{name.title()}</text>", html)) == 12
    assert len(set(Comparison(run, records).marks.values())) == 20


def test_both_modes_give_every_method_a_colour(run, records):
    html = shown(run, records)
    assert len(set(re.findall(r"--blue:(#\w+)", html))) == 2
    for name in METHODS:
        assert f'data-toggle="{name}"' in html
