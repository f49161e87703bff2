"""Text that others wrote, as the terminal gets it."""

from __future__ import annotations

from rich import markup

from coterie.text import printable


def escape(text: str) -> str:
    """``text`` without rich's markup, and with escapes for what a terminal would act on (ESC, turned text)."""
    return markup.escape(printable(text))


def one_line(text: str) -> str:
    """``text`` with escapes, also for its line breaks."""
    return printable(text).replace("\n", "\\n")
