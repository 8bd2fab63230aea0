"""Recipes: the papers' tables and figures as YAML files that can be run."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from normwise.lab.errors import UsageError, nearest
from normwise.lab.recipes.schema import (
    Paper,
    Recipe,
    RecipeCell,
    RecipeMethod,
    RecipeScale,
    Training,
    parse,
)

__all__ = [
    "Paper",
    "Recipe",
    "RecipeCell",
    "RecipeMethod",
    "RecipeScale",
    "Training",
    "find",
    "ids",
    "parse",
    "read",
    "text",
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
    return read(text(name), name)


def text(name: str) -> str:
    """The YAML of a recipe, found as :func:`find` does."""
    if name.endswith((".yaml", ".yml")):
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read recipe {name!r}: {error.strerror or error}") from None
    if name not in ids():
        raise UsageError(f"unknown recipe {name!r}: {nearest(name, ids())}")
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def read(content: str, where: str) -> Recipe:
    """A recipe from its YAML.

    Args:
        content: the YAML.
        where: the file, for errors.

    Raises:
        UsageError: if it is not a valid recipe.
    """
    try:
        import yaml
    except ImportError:
        raise UsageError('recipes need PyYAML: pip install "normwise[lab]"') from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """Refuses a key that is given twice, of which YAML's own readers drop one."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
                if key.value in seen:
                    place = f"line {key.start_mark.line + 1}"
                    raise UsageError(f"{where}, {place}: key {key.value!r} is given twice")
                seen.add(key.value)
            return node

    try:
        return parse(yaml.load(content, Loader), where)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}") from None
