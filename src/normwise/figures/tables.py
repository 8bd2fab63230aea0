"""Tables, described once and shown in a terminal, as plain text or on a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "Column", "Row", "Table", "paragraph", "show", "stdout"]

# Wide enough for a table when the output goes to a file and has no width of its own.
_FILE_WIDTH = 132


@dataclass(frozen=True)
class Column:
    """A column: its heading, a second line of it such as the unit, and whether it holds words.

    Words stand on the left and numbers on the right.
    """

    title: str
    unit: str = ""
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Args:
        text: the value.
        note: beside it and fainter, such as a spread.
        value: what a page sorts by; None for the text.
    """

    text: str
    note: str = ""
    value: float | str | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.note}" if self.note else self.text


@dataclass(frozen=True)
class Row:
    """The cells of a row.

    Args:
        cells: as many as columns; a text is a cell without more.
        series: the method whose row it is, and its ``colour`` and whether it is ``dashed``.
        words: what a page's filter searches.
    """

    cells: tuple[Cell | str, ...]
    series: str = ""
    colour: str = ""
    dashed: bool = False
    words: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows; the columns that matter most come first, for narrow screens."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""

    @classmethod
    def of(cls, columns: Sequence[Column | str], rows: Iterable[Sequence[str]]) -> Table:
        """A table of texts.

        Args:
            columns: a text is the title of a column of words.
            rows: the cells of each.
        """
        made = (Column(c, words=True) if isinstance(c, str) else c for c in columns)
        return cls(tuple(made), tuple(Row(tuple(row)) for row in rows))

    def __str__(self) -> str:
        """Plain text: columns two spaces apart, a line under the headings."""
        heads = [[c.title for c in self.columns]]
        if any(c.unit for c in self.columns):
            heads.append([c.unit for c in self.columns])
        lines = [*heads, *([str(cell) for cell in row.cells] for row in self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.columns))]

        def written(line: Sequence[str]) -> str:
            cells = (
                cell.ljust(width) if column.words else cell.rjust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            )
            return "  ".join(cells).rstrip()

        text = [written(line) for line in lines]
        text.insert(len(heads), "─" * max(map(len, text)))
        return "\n".join([self.title, "", *text] if self.title else text)


def paragraph(text: str, indent: int = 2) -> str:
    """A text in lines of at most 80 characters, those after the first indented."""
    return textwrap.fill(
        text, 80, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )


def stdout() -> Any:
    """Rich's console on stdout, wide enough for tables where that is a file."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=max(_FILE_WIDTH, console.width))


def show(table: Table) -> None:
    """Print a table on stdout, by rich where it is installed; the last columns only if they fit."""
    try:
        from rich import box
        from rich.table import Table as Grid
        from rich.text import Text
    except ImportError:
        print(table)
        return
    console = stdout()
    grid = Grid(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    left = console.width - 2
    shown = 0
    for k, column in enumerate(table.columns):
        cells = (column.title, column.unit, *(str(row.cells[k]) for row in table.rows))
        left -= max(map(len, cells)) + 2
        if left < -2 and k > 1:
            break
        heading = Text("\n".join(filter(None, (column.title, column.unit))))
        grid.add_column(heading, justify="left" if column.words else "right", no_wrap=True)
        shown += 1
    for row in table.rows:
        grid.add_row(*(Text(str(cell)) for cell in row.cells[:shown]))
    console.print(grid)
    if shown < len(table.columns):
        hidden = ", ".join(column.title for column in table.columns[shown:])
        console.print(f"Not shown, for want of width: {hidden}.", style="dim")
