"""Code blocks of the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/tutorial.md",
    *(path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "docs" / "guides").glob("*.md"))),
)
"""Pages with commands for users."""

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language, its text, and the reason why the tests do not run it (None: they do)."""

    page: str
    language: str
    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (REPOSITORY / page).read_text()
    return [Block(page, m["language"], m["text"], m["reason"]) for m in BLOCK.finditer(text)]


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page that can be run."""
    return [block.text for block in blocks(page) if block.language == "python" and block.reason is None]
