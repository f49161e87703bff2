"""The look that all pictures share, and how a picture becomes a file or part of a page.

``svg`` gives a picture that follows the light or dark colours of the page it stands on.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito's colours without yellow and black, which vanish on a light or a dark page.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, MUTED, LINE, SURFACE = "#1f2328", "#656d77", "#d0d7de", "#fffffe"
GAP, ON_PALE, ON_STRONG = "#fefeff", "#0b2239", "#fdfeff"  # between cells; the numbers in them
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    SURFACE: "var(--surface)",
    GAP: "var(--gap)",
    ON_PALE: "var(--on-pale)",
    ON_STRONG: "var(--on-strong)",
}
Cells = NDArray[np.float64]  # of a picture, [rows, columns]
_HALF_PAGE = 7.2  # inches; the text of a wider picture would be too small beside another
_STYLE: Any = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "text.parse_math": False,  # a client may be called "$a$"
    "svg.fonttype": "none",
    "svg.hashsalt": "coterie",
}


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and what to say of it."""

    name: str
    title: str
    figure: Figure
    note: str = ""

    @property
    def wide(self) -> bool:
        """Whether it takes more than half of a page."""
        return self.figure.get_figwidth() > _HALF_PAGE


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """``draw`` in the style of all our pictures, whatever the process has set."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inside


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, without a date or anything else that changes between runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


@styled
def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element for a page that sets --ink, --muted, --line and --surface.

    ``name`` is what the picture shows, for readers who do not see it; ids inside the page are made unique with it.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that our font does not have: the page's font draws it
        figure.savefig(
            out, format="svg", dpi=192, transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    own = re.sub(r"\W+", "-", name.lower()).strip("-")
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=xlink:href="#)', f"{own}-", text)
    text = re.sub(r"font(-family)?: [^;\"]*'[^;\"]*", _page_font, text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # it would rule the page
    narrowest = f'style="min-width: {0.95 * 72 * figure.get_figwidth():.0f}px"'  # below it, text is too small
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{own.replace("-", " ")}" stroke-linejoin="round" {narrowest} ', 1
    )


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``client-2`` before ``client-10``."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _page_font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[0])
    weight = "font-weight: bold; " if "bold" in match[0] or " 700 " in match[0] else ""
    return f"{weight}font-size: {size[0]}; font-family: inherit" if size else "font-family: inherit"


def number(value: float | None) -> float:
    """``value`` as a float, not-a-number for what is missing."""
    return math.nan if value is None else float(value)
