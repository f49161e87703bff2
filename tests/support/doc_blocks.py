"""The fenced blocks of the repository's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in ("docs", "examples", "bench") for page in (ROOT / folder).rglob("*.md"))]
)
FENCE = re.compile(r"^```(\w*) ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the word after it, its text, and where it starts."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str, mark: str | None = None) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") % 2 == 0, f"{page}: a fence is not closed"
        for match in FENCE.finditer(text):
            block = Block(page, text[: match.start()].count("\n") + 2, match[1], match[2], match[3])
            found += [block] if block.language == language and mark in (None, block.mark) else []
    return found
