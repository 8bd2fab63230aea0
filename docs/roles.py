"""What docstrings have of Sphinx, as the reference's Markdown and HTML: roles, mathematics, tables,
and blocks of code after two colons. Indices and powers are set as on the pages."""

import inspect
import re
import runpy
import textwrap
from pathlib import Path

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
SECTION = re.compile(r"^(?=\w+:\n {4})", re.MULTILINE)
TABLE = re.compile(
    r"^( *)(=+(?: +=+)+)\n(?P<head>.*\n)\1\2\n(?P<body>(?:.*\n)+?)\1\2$", re.MULTILINE
)
BLOCK = re.compile(r"^( *)(\S.*):{2}\n\n((?:(?:\1 +.*)?\n)*\1 +.*)", re.MULTILINE)
DISPLAYED = re.compile(r"^( *)\.\. math::\n\n?((?:\1 +.*\n?)+)", re.MULTILINE)

set_mathematics = runpy.run_path(str(Path(__file__).with_name("hooks.py")))["set_mathematics"]


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
    text = BLOCK.sub(fenced, TABLE.sub(table, text))
    text = ROLE.sub(link, INLINE.sub(lambda m: convert(join(m[1])), text))
    prose, *sections = SECTION.split(text)  # in which x_t may be the name of an argument
    return "".join([set_mathematics(prose), *sections])


def table(match):
    """Columns are ruled by = signs; a row without a first cell continues the one above."""
    indent, ruler = len(match[1]), match[2]
    starts = [indent + column.start() for column in re.finditer("=+", ruler)]
    spans = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]

    def cells(line):
        return [line[span].strip().replace("|", "\\|") for span in spans]

    rows = []
    for row in map(cells, match["body"].splitlines()):
        if row[0]:
            rows.append(row)
        else:
            rows[-1] = [
                f"{above} {cell}".strip() for above, cell in zip(rows[-1], row, strict=True)
            ]
    head = ["" if cell == "\\" else cell for cell in cells(match["head"])]
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    return textwrap.indent("\n".join(f"| {line} |" for line in lines), match[1])


def fenced(match):
    indent, said, code = match.groups()
    code = textwrap.indent(textwrap.dedent(code), indent)
    return f"{indent}{said}:\n\n{indent}```python\n{code}\n{indent}```"


def join(lines):
    return " ".join(lines.split())
