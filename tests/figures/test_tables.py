"""Tables: one layout as plain text and in a terminal."""

from __future__ import annotations

import sys

from normwise.figures.tables import Cell, Column, Row, Table, show

TABLE = Table(
    (Column("method", words=True), Column("accuracy", "%"), Column("seeds")),
    (
        Row(("SGD", Cell("98.5", "± 0.2"), "3")),
        Row(("[bold]Mine", Cell("7.0"), "12")),
    ),
)


def test_words_stand_on_the_left_and_numbers_on_the_right():
    assert str(TABLE).splitlines() == [
        "method        accuracy  seeds",
        "                     %",
        "─────────────────────────────",
        "SGD         98.5 ± 0.2      3",
        "[bold]Mine         7.0     12",
    ]


def test_without_rich_the_plain_text_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    show(TABLE)
    assert capsys.readouterr().out == f"{TABLE}\n"


def test_names_are_no_markup(capsys):
    show(TABLE)
    assert "[bold]Mine" in capsys.readouterr().out


def test_columns_that_do_not_fit_are_left_out_from_the_end_and_named(monkeypatch, capsys):
    monkeypatch.setattr("normwise.figures.tables._FILE_WIDTH", 40)
    monkeypatch.setenv("COLUMNS", "40")
    wide = Table(
        tuple(Column(f"column {k}") for k in range(8)),
        (Row(tuple("0.123456" for _ in range(8))),),
        "Wide",
    )
    show(wide)
    out = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 40 for line in out.splitlines())
    assert "0.123456" in out
    assert "want of width: column 4" in " ".join(out.split())
