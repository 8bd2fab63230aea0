"""What the site does to a page before it is rendered."""

import posixpath
import re

LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, **_):
    """Keep the words alone of a link that leads out of ``docs/``, to a file the site lacks."""

    def keep_inside(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        if target.startswith("../docs/"):  # a page of the repository that is shown here
            return f"[{match[1]}]({target.removeprefix('../docs/')}{match[3] or ''})"
        return match[1] if target.startswith("../") else match[0]

    return LINK.sub(keep_inside, markdown)
