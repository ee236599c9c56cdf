"""For the reference of the docs site: Sphinx roles in docstrings become links where the object has a place there, else code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod):`(~?)([^`<]+)`")


def link(found: re.Match[str]) -> str:
    """A link that may lead nowhere, in the form that mkdocs-autorefs reads."""
    short, path = found.groups()
    text = path.rpartition(".")[2] if short else path
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrite the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object."""
        if obj.docstring is not None:
            text = ROLE.sub(link, obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s*)\.\. note:: ", r"\1**Note:** ", text, flags=re.MULTILINE)
