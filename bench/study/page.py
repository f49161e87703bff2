"""Writes the study's tables into docs/results/study.md, and its picture, from the published figures.

python bench/study/page.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims
from _harness import RESULTS

from coterie.comparison.record import Figures, Record, read_record
from coterie.comparison.tables import overview, settings_of
from coterie.report.plots import INK, LINE, MUTED, PALETTE, png
from coterie.report.plots.style import styled

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "results" / "study.md", DOCS / "pictures" / "study.png"
FEDERATIONS = {"four-tasks": "Four tasks", "clinc150": "CLINC150 by domain", "sick": "SICK with skewed labels"}
ALONE = "local"
_REACH = (-100, 100)  # all gains
# Time is of several machines, operations are not known of all runs, and the rate has a column of its own.
_LEFT_OUT = ("time", "operations", "tuned to")


def main() -> None:
    records = published()
    text = PAGE.read_text()
    for name, record in records.items():
        text = filled(text, name, table(record))
    text = filled(text, "claims", claims.table(claims.claims_of(titled(records))))
    PAGE.write_text(text)
    png(picture(records), PICTURE)
    print(f"{PAGE}\n{PICTURE}")


def published() -> dict[str, Record]:
    """The published comparison of each federation."""
    records = {name: read_record(RESULTS / f"study-{name}.json") for name in FEDERATIONS}
    return {name: record for name, record in records.items() if record is not None}


def titled(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records by the titles of their federations."""
    return {FEDERATIONS[name]: record for name, record in records.items()}


def filled(text: str, name: str, new: str) -> str:
    """``text`` with ``new`` between the two comments that name the block."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    made, count = re.subn(f"{start}.*?{end}", lambda _: start + new + end, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE} has {count} blocks named {name}, and needs one")
    return made


def table(record: Record) -> str:
    """The comparison's overview in Markdown, the best method first."""
    grid = overview(record)
    names = [name for name in grid.head if name not in _LEFT_OUT and not name.startswith("rounds to")]
    rows = []
    for row, cells in zip(record.variants.values(), grid.rows, strict=True):
        by_name = dict(zip(grid.head, cells, strict=True))
        texts = [f"**{by_name[name].text}**" if by_name[name].best else by_name[name].text for name in names]
        rows.append((_below(row), [*texts, _rate(row)]))
    lines = [[*names, "learning rate"], ["---"] * (len(names) + 1), *(texts for _, texts in sorted(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@styled
def picture(records: Mapping[str, Record]) -> Figure:
    """Each method's gain over training alone, with a panel for each federation.

    Small dots are seeds, a large one is their mean. The gain of a seed is over training alone with that seed;
    a seed without that is left out.
    """
    titles = _titles(records)
    figure = Figure(figsize=(9.6, 1.0 + 0.23 * len(titles)), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for ax, (name, record) in zip(panels, records.items(), strict=True):
        _panel(ax, record, titles)
        ax.set_title(FEDERATIONS[name])
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].set_ylim(len(titles) - 0.4, -0.6)
    figure.supxlabel("gain in test accuracy over training alone, points", color=MUTED, fontsize=9)
    return figure


def _panel(ax: Axes, record: Record, titles: Sequence[str]) -> None:
    alone = {run.seed: run.mean or 0.0 for run in record.variants[ALONE].runs}
    ax.hlines(np.arange(len(titles)), *_REACH, color=LINE, linewidth=0.5, zorder=0)
    ax.axvline(0, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)), zorder=1)
    every = []
    for row in record.variants.values():
        paired = [run for run in row.runs if run.mean is not None and run.seed in alone]
        gains = [100 * ((run.mean or 0.0) - alone[run.seed]) for run in paired]
        if row.method == ALONE or not gains:
            continue
        colour, height = PALETTE[1] if row.method in claims.SYSTEMS else PALETTE[0], titles.index(row.title)
        ax.scatter(gains, [height] * len(gains), s=9, color=colour, alpha=0.6, linewidth=0)
        ax.scatter([np.mean(gains)], [height], s=46, color=colour, edgecolor=INK, linewidth=0.6, zorder=3)
        every += gains
    ax.set_xlim(min(every) - 1, max(every) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _titles(records: Mapping[str, Record]) -> list[str]:
    """All methods but training alone: those of the first federation by its accuracy, and after them the others."""
    rows = (row for record in records.values() for row in sorted(record.variants.values(), key=_below))
    return list(dict.fromkeys(row.title for row in rows if row.method != ALONE))


def _below(row: Figures) -> float:
    return -(row.mean or 0.0)


def _rate(row: Figures) -> str:
    """The learning rate that was chosen."""
    return next((setting.rpartition("=")[2] for setting in settings_of(row)), "-")


if __name__ == "__main__":
    main()
