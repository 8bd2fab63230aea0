"""What docstrings have of Sphinx, roles and mathematics, as HTML of the reference."""

import inspect
import re

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^( *)\.\. math::\n\n?((?:\1 +.*\n?)+)", re.MULTILINE)


class Roles(griffe.Extension):
    """Turn ``:func:`normwise.analyze``` into a link where the reference has that name, and LaTeX
    into MathML, which browsers draw without a script."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = html(inspect.cleandoc(obj.docstring.value), obj)


def html(text, obj):
    def link(match):
        name = match[1]
        target = name if name.startswith("normwise") else f"{obj.parent.path}.{name}"
        return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'

    text = DISPLAYED.sub(lambda m: f"{m[1]}{convert(join(m[2]), display='block')}\n", text)
    return ROLE.sub(link, INLINE.sub(lambda m: convert(join(m[1])), text))


def join(lines):
    return " ".join(lines.split())
