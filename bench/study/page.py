"""Writes the study's tables into docs/results/study.md, and its pictures, from the published figures.

python bench/study/page.py
python bench/study/page.py --pdf FOLDER    # only the pictures, as PDF
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims
import pictures
from _harness import RESULTS
from joined import curves_of

from coterie.comparison.figures import best_of, figures_of
from coterie.comparison.paired import against_best
from coterie.comparison.record import Figures, Record, read_record
from coterie.comparison.tables import overview, settings_of
from coterie.report.plots import png

DOCS = Path(__file__).parents[2] / "docs"
PAGE, GAINS, ROUNDS = (DOCS / path for path in ("results/study.md", "pictures/study.png", "pictures/study-rounds.png"))
FEDERATIONS = {"four-tasks": "Four tasks", "clinc150": "CLINC150 by domain", "sick": "SICK with skewed labels"}
# Time is of several machines, operations are not known of all runs, and the rate has a column of its own.
_LEFT_OUT = ("time", "operations", "tuned to")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdf", type=Path, metavar="FOLDER", help="write only the pictures, as PDF, into this folder")
    folder = parser.parse_args().pdf
    records = published()
    alike = {name: common(record) for name, record in records.items()}
    curves = {FEDERATIONS[name]: curves_of(_published(name)) for name in records}
    drawn = {GAINS: pictures.gains(titled(alike)), ROUNDS: pictures.by_round(titled(alike), curves)}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for path, figure in drawn.items():
            figure.savefig(folder / f"{path.stem}.pdf")
        return
    text = PAGE.read_text()
    for name, record in alike.items():
        text = filled(text, name, table(record))
    text = filled(text, "claims", claims.table(claims.claims_of(titled(records))))
    PAGE.write_text(text)
    for path, figure in drawn.items():
        png(figure, path)
    print(PAGE, *drawn, sep="\n")


def published() -> dict[str, Record]:
    """The published comparison of each federation."""
    records = {name: read_record(_published(name)) for name in FEDERATIONS}
    return {name: claims.named(record) for name, record in records.items() if record is not None}


def titled(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records by the titles of their federations."""
    return {FEDERATIONS[name]: record for name, record in records.items()}


def common(record: Record) -> Record:
    """``record`` of the seeds alone that every method has, so that the means of a table are of the same seeds."""
    seeds = claims.common_seeds(record)
    rows = {}
    for variant, row in record.variants.items():
        runs = [run for run in row.runs if run.seed in seeds]
        made = figures_of(variant, runs, row.method, row.evaluated, row.groups)
        rows[variant] = replace(made, title=row.title, tuned=row.tuned)
    means = {variant: row.validation for variant, row in rows.items()}
    best = best_of(means, record.primary)
    assert best is not None  # a study is tuned on validation data
    return replace(record, variants=against_best(rows, means, best, record.primary), best=best)


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
        rows.append((pictures.below(row), [*texts, _rate(row)]))
    lines = [[*names, "learning rate"], ["---"] * (len(names) + 1), *(texts for _, texts in sorted(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _published(name: str) -> Path:
    return RESULTS / f"study-{name}.json"


def _rate(row: Figures) -> str:
    """The learning rate that was chosen."""
    return next((setting.rpartition("=")[2] for setting in settings_of(row)), "-")


if __name__ == "__main__":
    main()
