"""Every public name says what it does, what it takes and what it gives."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re

import pytest

import normwise

# A summary that begins so is a noun phrase: it names what a method returns, and says it once.
NAMES_THE_RESULT = re.compile(
    r"(The|A|An|One|Each|Every|What|Whether|Which|Where|How|Why|As|This|Returns?) |``\w+``"
)
ENTRY = re.compile(r"    (\S.*?)(?: \(.*?\))?:(?:\s|$)")
SENTENCE_END = re.compile(r"(?<!\be\.g|\bi\.e)[.!?]['\"`)]*\s+[A-Z]")


def rooms():
    """normwise, and its rooms and files that say what is public."""
    yield normwise
    for info in pkgutil.iter_modules(normwise.__path__, "normwise."):
        room = importlib.import_module(info.name) if info.name != "normwise.__main__" else None
        if hasattr(room, "__all__"):
            yield room


def public_objects():
    found = {}
    for room in rooms():
        for name in room.__all__:
            value = getattr(room, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{room.__name__}.{name}")
    return {name: value for value, name in found.items() if _is_ours(value)}


def _is_ours(value):
    return value.__module__.partition(".")[0] == "normwise"


def entries(doc):
    """The names in the lists of arguments and attributes of a docstring."""
    found = set()
    for block in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n|\n)*)", doc + "\n", re.M):
        for line in block.splitlines():
            if match := ENTRY.match(line):
                found |= {name.strip().lstrip("*") for name in match[1].split(",")}
    return found


def methods(cls):
    """Public methods that a class defines itself, with what they override, nearest first."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        is_static = isinstance(value, staticmethod)
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and function.__qualname__.startswith(cls.__qualname__):
            bases = [getattr(base, name) for base in cls.__mro__ if name in vars(base)]
            yield name, function, bases, is_static


def complaints_of_callable(name, function, docs, takes_self):
    """What is wrong with the docstring of a function or method; ``docs``, overriding ones first."""
    doc = next((d for d in docs if d), "")
    if not (summary := doc.split("\n\n")[0]):
        return [f"{name} has no docstring"]
    found = complaints_of_summary(name, summary)
    signature = inspect.signature(function)
    params = list(signature.parameters)[1 if takes_self else 0 :]
    known = set().union(*map(entries, docs))
    found += [f"{name}: {p} is not in Args" for p in params if p not in known and p[0] != "_"]
    gives = signature.return_annotation not in ("None", "NoReturn", None, inspect.Signature.empty)
    says = re.search(r"^(Returns|Yields):", doc, re.M)
    if gives and not says and not (takes_self and NAMES_THE_RESULT.match(summary)):
        found.append(f"{name} does not say what it returns")
    return found


def complaints_of_summary(name, summary):
    summary = " ".join(summary.split())
    if not summary.endswith((".", ":")) or SENTENCE_END.search(summary):
        return [f"{name}: the summary is not one sentence: {summary}"]
    return []


def complaints_of_class(name, cls):
    doc = inspect.cleandoc(cls.__doc__ or "")
    found = complaints_of_summary(name, doc.split("\n\n")[0])
    ours = [base for base in cls.__mro__ if _is_ours(base)]
    makes = any("__init__" in vars(base) for base in ours)
    if makes and not issubclass(cls, enum.Enum) and not getattr(cls, "_is_protocol", False):
        known = set().union(*(entries(inspect.cleandoc(base.__doc__ or "")) for base in ours))
        params = [p for p in inspect.signature(cls).parameters if not p.startswith("_")]
        found += [f"{name}: {p} is not in Args" for p in params if p not in known]
    for key, function, bases, is_static in methods(cls):
        docs = [inspect.getdoc(base) or "" for base in bases]
        found += complaints_of_callable(f"{name}.{key}", function, docs, not is_static)
    for key, value in vars(cls).items():
        if isinstance(value, property) and not key.startswith("_") and not inspect.getdoc(value):
            found.append(f"{name}.{key} has no docstring")
    return found


@pytest.mark.parametrize("name", public_objects())
def test_a_public_name_is_documented(name):
    value = public_objects()[name]
    if inspect.isclass(value):
        assert not complaints_of_class(name, value)
    else:
        doc = inspect.getdoc(value) or ""
        assert not complaints_of_callable(name, value, [doc], takes_self=False)


def test_what_is_undocumented_is_complained_of():
    def good(a: int) -> int:
        """Add one.

        Args:
            a: a number.

        Returns:
            The next.
        """

    def bad(a: int, b: int) -> int:
        """Add one. Or two.

        Args:
            a: a number.
        """

    assert complaints_of_callable("good", good, [inspect.getdoc(good)], False) == []
    assert complaints_of_callable("bad", bad, [inspect.getdoc(bad)], False) == [
        "bad: the summary is not one sentence: Add one. Or two.",
        "bad: b is not in Args",
        "bad does not say what it returns",
    ]
    assert complaints_of_callable("none", bad, [""], False) == ["none has no docstring"]


def test_no_two_public_classes_of_different_rooms_have_one_name():
    """But for the callbacks, of which each framework's user finds one in its own place."""
    places = {}
    for info in pkgutil.walk_packages(normwise.__path__, "normwise."):
        if info.name.startswith("normwise.integrations") or info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # of an optional package
            continue
        for value in vars(module).values():
            if inspect.isclass(value) and _is_ours(value) and value.__name__[0] != "_":
                places.setdefault(value.__name__, set()).add(value.__module__)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
