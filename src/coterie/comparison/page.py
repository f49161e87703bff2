"""Makes ``compare.html``, ``compare.md`` and ``compare.tex`` from ``compare.json`` and the runs beside it.

They can be made again at any time. The page is one file with its pictures inside, in the look of a run's report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from coterie.comparison.figures import bytes_by_round, evaluations
from coterie.comparison.record import RECORD, Figures, Record, read_record
from coterie.comparison.tables import by_client, latex, leader, markdown, missing, notes, number, overview
from coterie.files import write_atomic
from coterie.ops.metrics import better
from coterie.report import plots
from coterie.report.page import PICTURE_FOLDER, environment
from coterie.report.plots import Picture
from coterie.report.plots.comparison import against_bytes, bands_by_round, gains, wins_and_losses
from coterie.report.tables import PERCENT, Table, tables, words
from coterie.runs.folder import REPORT
from coterie.types import CoterieError

PAGE, MARKDOWN, LATEX = "compare.html", "compare.md", "compare.tex"
ALONE = "local"  # the method that gains are over


def write_page(folder: Path, with_pictures: bool = False) -> Path:
    """Write the page and the tables in ``folder`` (``with_pictures``: each picture as a PNG too); the page's path.

    Raises :class:`CoterieError` for a folder without a comparison.
    """
    record = read_record(folder / RECORD)
    if record is None:
        raise CoterieError(
            f"{folder} holds no {RECORD} of this version; run `coterie compare` with the folder as --out"
        )
    pictures = list(comparison_pictures(record, folder))
    if with_pictures:
        for picture in pictures:
            plots.png(picture.figure, folder / PICTURE_FOLDER / f"{picture.name}.png")
    page = (
        environment()
        .get_template("compare.html.jinja")
        .render(
            name=folder.resolve().name,
            record=record,
            overview=overview(record),
            by_client=by_client(record),
            missing=missing(record),
            notes=notes(record),
            leader=leader(record),
            pictures=pictures,
            report_file=REPORT,
            tuning=_tuning(record),
            made=[*tables(record.versions, "Versions"), *tables(record.machine or {}, "Machine"), *_commit(record)],
        )
    )
    write_atomic(folder / PAGE, page.encode())
    write_atomic(folder / MARKDOWN, markdown(record).encode())
    write_atomic(folder / LATEX, latex(record).encode())
    return folder / PAGE


def comparison_pictures(record: Record, folder: Path) -> Iterator[Picture]:
    """By round with bands over seeds, against bytes, the gain of each client over local training, wins and losses."""
    name, percent = words(record.primary), record.primary in PERCENT
    label = f"test {name}, mean of the clients"
    curves = {row.title: _curves(row, folder, record.primary) for row in record.variants.values()}
    if any(curves.values()):
        bands = {title: [_band(rnd, of) for rnd, of in by_round.items()] for title, by_round in curves.items()}
        note = "Lines: mean over seeds. Bands: from the lowest seed to the highest."
        figure = bands_by_round(bands, label=label, percent=percent)
        yield Picture("compare-by-round", f"Test {name} by round", figure, note)
        costs = {
            title: [
                (float(np.mean([b for _, b in of])), float(np.mean([v for v, _ in of]))) for of in by_round.values()
            ]
            for title, by_round in curves.items()
        }
        figure = against_bytes(costs, label=label, percent=percent)
        yield Picture("compare-by-bytes", f"Test {name} against bytes", figure, "A mark per evaluated round.")
    if (alone := record.variants.get(ALONE)) and len(record.variants) > 1:
        over = {row.title: [*_gains(row, alone, record.primary).values()] for row in record.variants.values()}
        over[alone.title] = []  # as in the other pictures, each method keeps its colour
        figure = gains(over, label=f"gain in test {name} over {alone.title}", percent=percent)
        yield Picture("compare-gains", "Gain of each client over training alone", figure,
                      "The share of clients whose gain is at most x, mean over seeds.")  # fmt: skip
    if record.best is not None and len(record.variants) > 1:
        best = record.variants[record.best]
        against = {
            row.title: _gains(row, best, record.primary) for v, row in record.variants.items() if v != record.best
        }
        figure = wins_and_losses(against, percent=percent)
        yield Picture("compare-wins", f"Each client against {best.title}", figure,
                      f"{leader(record)} Larger marks: larger differences.")  # fmt: skip


def _curves(row: Figures, folder: Path, metric: str) -> dict[int, list[tuple[float, int]]]:
    """By round: the (test mean, bytes up to there) of every seed; only of rounds in which all seeds were evaluated."""
    by_round: dict[int, list[tuple[float, int]]] = {}
    for run in row.runs:
        spent = bytes_by_round(folder / run.folder)
        for event in evaluations(folder / run.folder):
            if (value := event.mean.get("test", {}).get(metric)) is not None:
                by_round.setdefault(event.round, []).append((value, spent.get(event.round, 0)))
    return {rnd: of for rnd, of in sorted(by_round.items()) if len(of) == len(row.runs)}


def _band(rnd: int, of: Sequence[tuple[float, int]]) -> tuple[int, float, float, float]:
    values = [value for value, _ in of]
    return rnd, float(np.mean(values)), min(values), max(values)


def _gains(row: Figures, other: Figures, metric: str) -> dict[str, float]:
    """By client: how much better it is than with the other, in the metric's unit."""
    sign = -1.0 if better(metric, 0.0, 1.0) else 1.0
    return {
        client: sign * (value - base)
        for client, value in row.clients.items()
        if value is not None and (base := other.clients.get(client)) is not None
    }


def _tuning(record: Record) -> list[Table]:
    """Validation means of what was tried: a row per variant, a column per point of the grid."""
    tried: Mapping[str, Mapping[str, float | None]] = {
        row.title: row.tuned.tried for row in record.variants.values() if row.tuned and row.tuned.tried
    }
    points = list(dict.fromkeys(point for of in tried.values() for point in of))
    if not points:
        return []
    rows = [[title, *(number(of.get(point), record.primary) for point in points)] for title, of in tried.items()]
    return [Table(f"Tuning: validation {words(record.primary)}", ["method", *points], rows)]


def _commit(record: Record) -> list[Table]:
    return tables({"commit": record.commit}, "Coterie") if record.commit else []
