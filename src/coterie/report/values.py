"""Shows, as tables, what a method reports about its state beyond the other findings."""

from __future__ import annotations

from collections.abc import Iterator

from coterie.methods.findings import Values
from coterie.report.read import Run
from coterie.report.tables import Table, tables

FINDING = Values


def show(values: Values, run: Run) -> Iterator[Table]:
    """A table of the plain values, and one of each list or mapping of records."""
    yield from tables(values.values, "State after the last round")
