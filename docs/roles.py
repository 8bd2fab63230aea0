"""Sphinx's roles in docstrings, as links of the reference."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turn ``:func:`normwise.analyze``` into a link, where the reference has that name."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return

        def link(match):
            name = match[1]
            for target in (name, f"{obj.path}.{name}", f"{obj.parent.path}.{name}"):
                if target.startswith("normwise"):
                    break
            return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
