"""The pages' common part: templates, and what all of them are given."""

from __future__ import annotations

from functools import cache
from typing import Any

from normwise.figures import Chart, css, piece

__all__ = ["page"]


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("normwise.lab.report", ".")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def source(name: str) -> Any:
        """A file's text as it is."""
        return Markup(loader.get_source(environment, name)[0])

    def drawn(chart: Chart, height: float | None = None) -> Any:
        return Markup(piece(chart, height))

    environment.globals.update(source=source, drawn=drawn, colours=lambda: Markup(css()))
    environment.filters["markup"] = Markup
    return environment


def page(template: str, **content: Any) -> str:
    """A page as one HTML document that loads nothing.

    Args:
        template: the name of a template beside this file.
        content: its variables; texts are escaped.
    """
    return str(_environment().get_template(template).render(**content))
