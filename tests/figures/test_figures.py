"""Every chart from one description: the same shapes as SVG and painted, labels that can be read."""

from __future__ import annotations

import itertools
import math
import pickle
import random
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from normwise.figures import (
    COLOURS,
    HUES,
    Axis,
    Dots,
    Figure,
    Heat,
    Line,
    Lines,
    Link,
    Links,
    Plane,
    Series,
    Spacing,
    document,
    marks,
    matplotlib_figure,
    piece,
    png,
    ramp,
    save,
)
from normwise.figures.layout import LABEL, apart, draw, draw_figure, natural_height
from normwise.figures.shapes import Group, Label, shortened, text_width, wrapped

STEP = Axis("step", Spacing.TIGHT)


def lines(count=3, points=5, y="norm", **given):
    made = tuple(
        Line(
            f"m{k}",
            f"method {k}",
            tuple(map(float, range(points))),
            tuple(1 + k * 0.01 + p * 0.1 for p in range(points)),
            tuple(0.9 + k * 0.01 + p * 0.1 for p in range(points)),
            tuple(1.1 + k * 0.01 + p * 0.1 for p in range(points)),
        )
        for k in range(count)
    )
    return Lines("Norm", "a note", STEP, Axis(y), made, **given)


CHARTS = {
    "lines": lines(),
    "dots": Dots(
        "Dots",
        "",
        Axis("ratio", Spacing.LOG),
        ("a", "b"),
        (
            Series("angle", (0.5, math.nan), (0.4, math.nan), (0.6, math.nan)),
            Series("norm", (1, 2)),
        ),
        reference=1.0,
        band=(0.9, 1.1),
    ),
    "bars": Dots("Bars", "", Axis("n"), ("a", "b"), (Series("", (1.0, 3.0)),), bars=True),
    "heat": Heat(
        "Heat",
        "",
        ("a", "b"),
        ("1", "2"),
        ((1.0, 2.0), (math.nan, 4.0)),
        "step",
        "%",
        text=lambda v: f"{v:.0f}",
        outlined=(1, 1),
    ),
    "links": Links(
        "Links",
        "",
        ("first.weight", "second.weight", "third"),
        (("a", "blue"),) * 3,
        (Link((0,), (1,), "32"), Link((1, 2), (2,), "4"), Link((2,), (), "1")),
        "c",
        "1/c",
        "both",
    ),
    "plane": Plane(
        "Plane",
        "",
        (Line("p", "p", (0.0, 1.0), (1.0, 0.0)),),
        -2,
        2,
        -2,
        2,
        lambda angle: 0.5,
        ((1.0, "1"),),
        ((0.0, 1.0, "start"),),
    ),
}


def texts(shapes):
    for shape in shapes:
        if isinstance(shape, Group):
            yield from texts(shape.shapes)
        elif isinstance(shape, Label):
            yield shape


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_one_description_gives_an_svg_file_a_piece_of_a_page_and_a_matplotlib_figure(chart):
    pytest.importorskip("matplotlib", reason="paints")
    figure = Figure("", (chart,))
    svg = ElementTree.fromstring(document(figure).partition("\n")[2])
    space = {"s": "http://www.w3.org/2000/svg"}
    written = [e.text for e in svg.findall(".//s:text", space)]
    (ax,) = matplotlib_figure(figure).axes
    painted = [t.get_text() for t in ax.texts]
    assert written == painted == [t.text for t in texts(draw_figure(figure).shapes)]
    areas = [e for e in svg.iter() if e.tag.endswith(("polygon", "circle"))]
    assert len(ax.patches) == len(areas)
    assert len(ax.lines) == len(svg.findall(".//s:polyline", space))
    for form in re.findall("<svg.*?</svg>", piece(chart)):
        ElementTree.fromstring(form)


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
@pytest.mark.parametrize("width", [330, 540, 900])
def test_every_text_lies_inside_the_drawing_and_over_no_other(chart, width):
    drawing = draw(chart, width)
    boxes = []
    for t in texts(drawing.shapes):
        wide = text_width(t.text, t.size, t.bold)
        left = t.x - {"start": 0, "middle": wide / 2, "end": wide}[t.anchor]
        boxes.append((left, t.y - 0.7 * t.size, left + wide, t.y, t.text))
        if chart is not CHARTS["plane"]:
            assert left > -6, t
        assert left + wide < width + 6, t
        assert 0 <= t.y <= drawing.height + 1, t
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_moved_as_little_as_need_be(seed):
    """Isotonic regression: no admissible places that are tried are nearer in squares."""
    r = random.Random(seed)
    wanted = [r.uniform(0, 100) for _ in range(5)]
    found = apart(wanted, 0, 200)
    ordered = sorted(found)
    assert all(b - a >= LABEL - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(found) >= 0
    assert max(found) <= 200
    assert sorted(range(5), key=wanted.__getitem__) == sorted(range(5), key=found.__getitem__)

    def distance(places):
        return sum((a - b) ** 2 for a, b in zip(wanted, places, strict=True))

    rank = {i: k for k, i in enumerate(sorted(range(5), key=wanted.__getitem__))}
    for _ in range(200):
        tried = sorted(r.uniform(0, 200 - 4 * LABEL) for _ in range(5))
        near = [tried[rank[i]] + rank[i] * LABEL for i in range(5)]
        assert distance(found) <= distance(near) + 1e-9


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 labels do not fit"):
        apart([1, 2, 3], 0, 20)


@pytest.mark.parametrize("count", [1, 2, 20, 30])
def test_up_to_thirty_lines_are_all_named_however_near_their_ends(count):
    chart = lines(count)
    drawing = draw(chart, 540)
    named = [t for t in texts(drawing.shapes) if t.bold and t.text.startswith("method")]
    named = named or [t for t in texts(drawing.shapes) if t.text.startswith("method")]
    assert len(named) == count
    places = sorted(t.y for t in named)
    assert all(b - a >= LABEL - 1e-9 for a, b in itertools.pairwise(places))


def test_more_lines_have_no_names_but_a_strip_of_their_order():
    chart = lines(31)
    said = [t.text for t in texts(draw(chart, 540).shapes)]
    assert "method 0" in said
    assert "method 30" in said
    assert "method 15" not in said
    assert len([t for t in said if t.startswith("method")]) == 2


def test_a_line_is_interrupted_where_it_is_not_finite():
    line = Line("a", "a", (0, 1, 2, 3, 4), (1, 2, math.nan, 3, 4))
    chart = Lines("t", "", STEP, Axis("y"), (line, Line("b", "b", (0,), (math.inf,))))
    svg = document(Figure("", (chart,)))
    assert "nan" not in svg
    assert "inf" not in svg
    assert svg.count('<polyline points="') - svg.count('class="s-line"') >= 2
    assert ">b</text>" not in svg


def test_a_lone_value_and_equal_values_are_drawn():
    for y in ((0.0,), (1.0, 1.0), (-3.0, -3.0)):
        for spacing in Spacing:
            chart = Lines(
                "t", "", STEP, Axis("y", spacing), (Line("a", "a", tuple(range(len(y))), y),)
            )
            assert "nan" not in piece(chart)


@pytest.mark.parametrize("spacing", [s for s in Spacing if s is not Spacing.TIGHT])
@pytest.mark.parametrize(
    "values", [[0.2, 0.9], [0.1, 0.1], [0.5], [1e-3, 0.02, 0.3], [0.98, 0.99, 1.0], [1e-12, 1]]
)
def test_axes_keep_the_order_and_hold_all_values(spacing, values):
    scale = spacing.scale(values)
    places = [scale.place(v) for v in sorted(values)]
    assert places == sorted(places)
    inside = [scale.place(v) for v, _ in scale.ticks]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in (*places, *inside))
    assert all(b > a for a, b in itertools.pairwise(inside))
    assert 2 <= len(inside) <= 13


def test_logarithmic_ticks_are_evenly_spaced_and_a_zero_lies_at_the_least_positive_value():
    scale = Spacing.LOG.scale([1.6e-6, 0.3, 0.0])
    places = [scale.place(v) for v, _ in scale.ticks]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    assert "10⁻⁵" in {text for _, text in scale.ticks}
    assert scale.place(0.0) == scale.place(1.6e-6)


def test_what_is_empty_takes_no_panel():
    empty = Lines("Nothing here", "", STEP, Axis("y"), (Line("a", "a", (), ()),))
    svg = document(Figure("", (empty, lines())))
    assert "Nothing here" not in svg
    assert "Norm" in svg
    assert piece(empty) == ""
    assert "Nothing to draw" in document(Figure("All of it", (empty,)))


def test_names_are_escaped_wherever_they_stand():
    bad = '<script>alert("x")</script>&'
    chart = replace(lines(), title=bad, lines=(Line(bad, bad, (0.0, 1.0), (1.0, 2.0)),))
    rows = Dots(bad, "", Axis(bad), (bad,), (Series(bad, (1.0,)),))
    for text in (piece(chart), piece(rows), document(Figure(bad, (chart, rows)))):
        assert "<script" not in text
        for form in re.findall("<svg.*?</svg>", text, re.DOTALL):
            ElementTree.fromstring(form)
    assert (
        "$" in matplotlib_figure(Figure("costs $5 or $6", (lines(),))).axes[0].texts[0].get_text()
    )


def test_a_file_follows_the_system_and_a_piece_the_page():
    svg = document(Figure("", (lines(),)))
    assert "prefers-color-scheme:dark" in svg
    assert COLOURS["blue"].dark in svg
    assert "var(" not in svg
    assert COLOURS["blue"].dark not in piece(lines())
    assert 'class="s-blue"' in piece(lines())


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_lines_and_texts_stand_out_from_the_ground(ground):
    """WCAG 2: 3 for what is drawn, 4.5 for what is read; names of methods are read."""
    card = getattr(COLOURS["card"], ground)
    for name in (*HUES, "ink", "muted"):
        assert contrast(getattr(COLOURS[name], ground), card) >= 3.8, name
    for k in range(12):
        assert contrast(getattr(COLOURS[f"order-{k}"], ground), card) >= 2.7, k


def test_a_method_has_one_colour_wherever_it_is_drawn():
    alone = marks(["adamp"])["adamp"][0]
    assert marks(["x", "sgd", "adamp", "y"])["adamp"][0] == alone
    many = marks([f"method {k}" for k in range(20)])
    assert len(set(many.values())) == 20
    assert marks(["sgd", "sgdp"], {"sgd"})["sgd"][1] != ()
    assert marks(["sgd", "sgdp"], {"sgd"})["sgdp"][1] == ()


def test_the_ramps_are_monotone_in_lightness():
    for ground in ("light", "dark"):
        for kind in ("order", "heat"):
            colours = [getattr(COLOURS[ramp(kind, k / 11)], ground) for k in range(12)]
            values = [luminance(c) for c in colours]
            assert values in (sorted(values), sorted(values, reverse=True))


def test_texts_are_shortened_in_their_middle_and_wrapped_between_words():
    name = "model.layers.0.self_attention.query_key_value"
    short = shortened(name, 120)
    assert text_width(short) <= 120
    assert short[:3] == name[:3]
    assert short[-3:] == name[-3:]
    assert shortened("abc", 120) == "abc"
    wide = wrapped("some words that take more than one line", 90)
    assert " ".join(wide) == "some words that take more than one line"
    assert all(text_width(line) <= 90 for line in wide)


def test_files_are_written_by_their_suffix(tmp_path):
    pytest.importorskip("matplotlib", reason="paints")
    figure = Figure("", (lines(),))
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        save(figure, tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
    assert png(figure, "dark") != png(figure)


def test_an_svg_needs_no_matplotlib_and_a_png_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "normwise.figures.canvas", raising=False)
    save(Figure("", (lines(),)), tmp_path / "a.svg")
    with pytest.raises(ImportError, match=r"pip install normwise\[lab\]"):
        png(Figure("", (lines(),)))


def test_charts_of_a_row_are_equally_high():
    tall, low = lines(25), lines(2)
    assert natural_height(tall, 540) > natural_height(low, 540)
    (high,) = {draw(c, 540, 500, titled=False).height for c in (tall, low)}
    assert high == 500


def test_a_matplotlib_figure_shows_itself_in_a_notebook_and_can_be_pickled():
    shown = matplotlib_figure(Figure("", (lines(),)))
    assert shown._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pickle.loads(pickle.dumps(shown))._repr_png_() == shown._repr_png_()
