"""The HTML report and its charts."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from normwise.lab.report import render as render_page
from normwise.lab.report.charts import (
    Frame,
    Line,
    _apart,
    linear,
    logarithmic,
    stretched_to_one,
    svg,
)
from normwise.lab.summary import Curve, summarize


def render(run, records):
    return render_page(run, records, summarize(records, run["methods"], 2, 899), {})


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
def records(record):
    return [
        record(name, seed, epoch, norm_growth=1 + rate * epoch, test_accuracy=0.5 + 0.2 * epoch)
        for name, rate in (("sgd", 0.5), ("sgdp", 0.1))
        for seed in range(2)
        for epoch in range(3)
    ]


def test_the_page_is_well_formed_and_shows_everything(run, records):
    page = Page(render(run, records))
    assert page.open == []
    assert page.tags.count("figure") == 6
    assert page.tags.count("svg") == 7  # the toy is the seventh
    text = " ".join(page.words)
    assert "SGDP kept the norms smaller than SGD" in text
    assert run["command"] in text
    for digits in ("3.7258", "1.3491", ".0010", "2.93"):
        assert f"paper {digits}" in text


def test_the_page_loads_nothing(run, records):
    html = render(run, records)
    page = Page(html)
    loading = {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}
    assert [a for a in page.attributes if a[1] in loading] == []
    assert not re.search(r"https?://|@import|url\((?!#)|\bimport\s*\(|fetch\(", html)
    assert {"link", "img", "iframe", "object"}.isdisjoint(page.tags)


def test_what_is_not_ours_is_escaped(run, records, failure):
    run["task"]["title"] = run["task"]["source"] = '</title><script>alert("x")</script>'
    bad = {**failure("sgd", 1), "error": "<img src=x onerror=alert(1)>"}
    page = Page(render(run, [*records, bad]))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags


def test_the_data_of_the_tooltips_are_those_of_the_metrics(run, records):
    html = render(run, records)
    (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    lines = json.loads(embedded)["norm_growth"]["lines"]
    assert [line["name"] for line in lines] == ["sgd", "sgdp"]
    assert lines[0]["epochs"] == [0, 1, 2]
    assert lines[0]["text"][2] == "×2.000 (×2.000 – ×2.000)"


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_an_interrupted_run_says_so(run, records, status):
    html = render({**run, "status": status}, records)
    assert ('class="notice"' in html) == (status == "interrupted")


def test_a_run_without_records_still_makes_a_page(run):
    page = Page(render({**run, "status": "interrupted"}, []))
    assert page.open == []
    assert " ".join(page.words).count("No finished epoch to draw") == 6


def test_both_modes_give_every_optimizer_a_colour(run, records):
    html = render(run, records)
    for name in ("sgd", "sgdp", "adamw", "adamp"):
        assert len(set(re.findall(rf"\.o-{name}{{--c:(#\w+)}}", html))) == 2


@pytest.mark.parametrize("make", [linear, logarithmic, stretched_to_one])
@pytest.mark.parametrize(
    "values", [[0.2, 0.9], [0.1, 0.1], [0.5], [1e-3, 0.02, 0.3], [0.98, 0.99, 1.0]]
)
def test_axes_keep_the_order_and_hold_all_values(make, values):
    scale = make(values)
    places = [scale.place(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert len(scale.ticks) >= 2
    inside = [scale.place(v) for v, _ in scale.ticks]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in inside)
    assert all(b > a for a, b in itertools.pairwise(inside))


def test_logarithmic_ticks_are_evenly_spaced():
    scale = logarithmic([1.6e-6, 0.3])
    places = [scale.place(v) for v, _ in scale.ticks]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    assert scale.ticks[0][1] == "10⁻⁶"


def test_a_zero_on_a_logarithmic_axis_lies_at_the_least_positive_value():
    scale = logarithmic([0.0, 1e-4, 1.0])
    assert scale.place(0.0) == scale.place(1e-4)


def test_labels_never_overlap_and_stay_inside():
    places = _apart([100.0, 100.0, 101.0, 300.0], 30, 290)
    ordered = sorted(places)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= 29
    assert ordered[-1] <= 290


def test_a_chart_is_drawn_for_one_epoch_and_equal_values():
    curve = Curve((0,), (1.0,), (1.0,), (1.0,), seeds=1)
    drawing = svg("a & b", Frame([Line("sgd", "SGD", curve)], linear), "η < 1", [])
    page = Page(drawing)
    assert page.open == []
    assert "nan" not in drawing
    assert {"a & b", "η < 1", "SGD"} <= set(page.words)
