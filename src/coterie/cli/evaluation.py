"""What ``coterie evaluate``, ``coterie export`` and ``coterie onboard`` show."""

from __future__ import annotations

from pathlib import Path

from coterie.artifacts.cross import CrossTable, cross_table
from coterie.artifacts.evaluate import Evaluation
from coterie.artifacts.export import Exported
from coterie.cli import console
from coterie.cli.console import heading, say, show_aligned
from coterie.comparison.tables import number
from coterie.compute.join import Joined
from coterie.report.tables import words

LABELS = 20  # rows and columns of a confusion matrix that a terminal shows; --out writes them all
CLIENTS = 20  # the same for the table of all clients


def show_evaluation(evaluation: Evaluation) -> None:
    """The metrics, and the confusion matrix where it fits."""
    heading(console.out, f"{evaluation.client} on {evaluation.data}: {evaluation.rows} rows")
    figures = dict(evaluation.metrics)
    rows = [(words(name), number(value, name)) for name, value in figures.items()]
    if evaluation.calibration_error is not None:
        rows.append(("expected calibration error", number(evaluation.calibration_error, "calibration_error")))
    show_aligned(("metric", "value"), rows)
    labels, counts = evaluation.labels, evaluation.confusion
    if labels is None or counts is None:
        return
    if len(labels) > LABELS:
        say(f"the confusion matrix has {len(labels)} labels; --out FILE writes it")
        return
    heading(console.out, "rows by label (down) and prediction (across)")
    table = [(label, *map(str, row)) for label, row in zip(labels, counts, strict=True)]
    show_aligned(("", *labels), table)


def show_cross(folder: Path, metric: str) -> None:
    """Every client's model on every client's test rows, and where the picture is."""
    table: CrossTable = cross_table(folder, metric)
    if len(table.clients) <= CLIENTS:
        heading(console.out, f"{words(table.metric)}: whose model (down), on whose test rows (across)")
        show_aligned(("", *table.clients), [(of, *row) for of, row in zip(table.clients, table.cells, strict=True)])
    say(f"picture: {table.picture}")
    say(f"figures: {folder / 'cross.json'}")


def show_export(made: Exported) -> None:
    """What a static form costs, and where the files are."""
    if made.cost is not None:
        cost = made.cost
        heading(console.out, f"routed and static on {cost.data}: {cost.rows} rows")
        rows = [
            (words(name), number(cost.routed[name], name), number(value, name)) for name, value in cost.static.items()
        ]
        show_aligned(("metric", "routed", "static"), rows)
        if "accuracy" in cost.static:
            say(f"the static form costs {-cost.points('accuracy') + 0.0:.1f} points of accuracy")
    elif made.form != "bundle":
        say("there were no labelled rows to measure the static form on")
    rank = f" of rank {made.rank}" if made.rank else ""
    say(f"{made.form}{rank}: {made.folder}")


def show_joined(joined: Joined, out: Path) -> None:
    """What a new client scores before and after, and where its bundle is."""
    if joined.after:
        heading(console.out, f"{joined.client}, on its test rows, before and after its router and head trained")
        rows = [(words(name), number(joined.before[name], name), number(v, name)) for name, v in joined.after.items()]
        show_aligned(("metric", "before", "after"), rows)
    else:
        say("there are no test rows to score it on")
    if not joined.trained:
        say("nothing was trained: its model has neither a router nor a head")
    say(f"bundle: {out}")
