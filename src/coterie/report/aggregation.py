"""Shows the error of averaging A and B separately."""

from __future__ import annotations

from collections.abc import Iterator

from coterie.methods.findings import AggregationError
from coterie.report import plots
from coterie.report.plots import Picture
from coterie.report.read import Run
from coterie.report.tables import Table

FINDING = AggregationError


def show(found: AggregationError, run: Run) -> Iterator[Picture | Table]:
    """The error by round, or the only value if there is just one."""
    after = {rnd: error.value for rnd, error in run.history(AggregationError).items() if rnd}
    curve = [(rnd, value) for rnd, value in after.items() if value is not None]
    if len(curve) > 1:
        figure = plots.lines_by_round({"error": curve}, label="relative error", percent=False)
        note = "What averaging A and B separately loses: the norm of mean(BA) - mean(B) mean(A) over that of mean(BA)."
        yield Picture("aggregation-error", "Aggregation error by round", figure, note)
    elif found.value is not None:
        yield Table("Averaging", ["", ""], [("error of averaging A and B separately", found.value)])
