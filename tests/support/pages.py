"""The commands and snippets of README.md and of the pages of docs/.

A fenced block says its language. The comment right above it may be ``<!-- not run: REASON -->`` or ``<!-- slow: REASON -->``; of
the commands in its sentences and tables a page says ``<!-- in sentences, not run: REASON -->``.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[\w ]+): (?P<reason>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_UNRUN = re.compile(r"<!-- in sentences, not run: ([^>]+) -->")
_INLINE = re.compile(r"`((?:deflow|python|make|pip) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: ``marker`` is "", "not run" or "slow"."""

    page: str
    line: int
    language: str
    text: str
    marker: str
    reason: str

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page from top to bottom."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found["marker"] or "",
            found["reason"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def inline_commands(page: Path) -> list[list[str]]:
    """The words of each command that stands in a sentence or a table of a page."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [shlex.split(found) for found in _INLINE.findall(prose)]


def why_not_run(page: Path) -> str:
    """Why the commands in a page's sentences and tables are not run; "" where it does not say."""
    found = _UNRUN.search(page.read_text(encoding="utf-8"))
    return "" if found is None else found[1]


def commands_run() -> set[tuple[str, ...]]:
    """The commands of all pages' fenced blocks that a test runs."""
    shells = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
    return {tuple(words) for block in shells if block.marker != "not run" for words in block.commands()}
