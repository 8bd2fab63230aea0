"""What the site does to a page before and after it is rendered."""

import argparse
import importlib
import os
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^<!-- include: ([\w.]+) -->$", re.MULTILINE)
ROOM = re.compile(r"^::: (normwise(?:\.\w+)?)$", re.MULTILINE)
PICTURE = re.compile(r'<p>(<img [^>]*?src="([^"]+)"[^>]*>)</p>')
# What is not prose: code, comments and tags, targets of links.
KEPT = re.compile(r"(^```.*?^```|`+[^`\n]+`+|<[^>\n]+>|\]\([^)\s]*\))", re.MULTILINE | re.DOTALL)
NAME = r"[A-Za-z]+[ₐ-ₜ]?|[0-9]+(?:\.[0-9]+)?|[\u0370-\u03ff]|[¼½]"
INDEX = re.compile(
    r"(?<![A-Za-z0-9_])((?:[^\W\d_]|‖)[\u0300-\u036f]*)_(?:\{([^}\n]+)\}|(" + NAME + "))"
)
POWER = re.compile(
    r"(?<=[\w)‖|\u0300-\u036f>])\^"
    r"(?:\{([^}\n]+)\}|\(((?:[^()\n]|\([^()\n]*\))+)\)|(−?(?:" + NAME + ")))"
)
HELP = re.compile(r"^<!-- help: ([a-z ]+) -->$", re.MULTILINE)


def on_page_markdown(markdown, page, **_):
    """Include files of the repository, show commands' help, and keep links within the site."""
    markdown = ROOM.sub(show_hidden, set_mathematics(INCLUDE.sub(include, markdown)))
    return HELP.sub(show_help, keep_links_inside(markdown, page.file.src_uri))


def on_page_content(html, **_):
    """Each picture is a link to itself, for a screen that it is too small on."""
    return PICTURE.sub(r'<p><a class="picture" href="\2">\1</a></p>', html)


def include(match):
    """The text of a file beside ``docs/``, its links as seen from within."""
    text = (ROOT / match[1]).read_text(encoding="utf-8")
    return LINK.sub(
        lambda link: f"[{link[1]}]({posixpath.relpath(link[2], 'docs')}{link[3] or ''})", text
    )


def set_mathematics(markdown):
    """Indices and powers, which the pages write as w_t, w_{t+1}, 2^(k−1), where they belong."""

    def lower(match):
        return f"{match[1]}<sub>{(match[2] or match[3]).replace('<', '&lt;')}</sub>"

    def raise_(match):
        return f"<sup>{match[1] or match[2] or match[3]}</sup>"

    parts = KEPT.split(markdown)
    parts[::2] = [POWER.sub(raise_, INDEX.sub(lower, part)) for part in parts[::2]]
    return "".join(parts)


def keep_links_inside(markdown, page):
    """Keep the words alone of a link out of ``docs/``, to a file that the site does not have."""

    def keep(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        return match[1] if target.startswith("../") else match[0]

    return LINK.sub(keep, markdown)


def show_hidden(match):
    """A room, and before it what the reference takes for the file of the same name."""
    room = importlib.import_module(match[1])
    hidden = ""
    for name in room.__all__:
        home = getattr(getattr(room, name), "__module__", "")
        if home.rpartition(".")[2] == name:
            hidden += f"[](){{#{match[1]}.{name}}}\n\n::: {home}.{name}\n"
            hidden += "    options: {show_root_heading: true, show_root_full_path: false, "
            hidden += "show_root_toc_entry: true}\n\n"
    return f"{hidden}{match[0]}"


def show_help(match):
    from normwise.cli import _parser

    parser = _parser()
    for name in match[1].split():
        (subcommands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = subcommands.choices[name]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"  # argparse breaks its lines by it
    try:
        text = parser.format_help()
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return f"```text\n{text}```"
