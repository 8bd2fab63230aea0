"""Recipes: the papers' tables and figures as YAML files that can be run."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from normwise.lab.errors import UsageError, nearest
from normwise.lab.recipes.schema import Cell, Method, Paper, Recipe, Scale, Training, parse

__all__ = [
    "Cell",
    "Method",
    "Paper",
    "Recipe",
    "Scale",
    "Training",
    "find",
    "ids",
    "parse",
    "read",
]


def ids() -> list[str]:
    """The names of the recipes that come with the library."""
    folder = files(__name__)
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name)


def find(name: str) -> Recipe:
    """A recipe of the library by its name, or one of the user's by its path.

    Raises:
        UsageError: if there is none, or it is not a valid recipe.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return read(Path(name).read_text(encoding="utf-8"), name)
        except OSError as error:
            raise UsageError(f"cannot read recipe {name!r}: {error.strerror or error}") from None
    if name not in ids():
        raise UsageError(f"unknown recipe {name!r}: {nearest(name, ids())}")
    file = files(__name__).joinpath(f"{name}.yaml")
    return read(file.read_text(encoding="utf-8"), f"{name}.yaml")


def read(text: str, where: str) -> Recipe:
    """A recipe from its YAML.

    Args:
        text: the YAML.
        where: the file, for errors.

    Raises:
        UsageError: if it is not a valid recipe.
    """
    try:
        import yaml
    except ImportError:
        raise UsageError('recipes need PyYAML: pip install "normwise[lab]"') from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}") from None
    return parse(content, where)
