"""The tables that ``coterie compare`` and ``coterie demo`` end with."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from coterie.cli.console import heading
from coterie.cli.plain import escape
from coterie.comparison.figures import Comparison, record_of
from coterie.comparison.page import LATEX, MARKDOWN, PAGE
from coterie.comparison.record import RECORD, Record
from coterie.comparison.tables import Cell, Grid, brief, by_client, notes

_COLUMNS = 6  # methods up to which a terminal has room for a column each


def show(console: Console, comparison: Comparison, folder: Path, target: float | None = None) -> None:
    """The tables, where the files are, and which runs have no result, with the reason."""
    if comparison.done:
        show_record(console, record_of(comparison, target))
        for path in (folder / name for name in (PAGE, MARKDOWN, LATEX, RECORD)):
            console.print(f"{'page' if path.name == PAGE else 'tables'}: {path}", highlight=False, soft_wrap=True)
        console.print(f"each run has a report.html; see {folder}", highlight=False, soft_wrap=True)
    for entry in comparison.missing:
        what = f"{entry.variant} {' '.join([*entry.settings, ''])}seed {entry.seed}"
        text = f"[bold yellow]no result:[/] {escape(what)}: {escape(entry.why)}: {escape(entry.reason)}"
        console.print(text, highlight=False, soft_wrap=True)


def show_record(console: Console, record: Record) -> None:
    """A row per method; where they are few, before it a row per client. The best of each is in bold."""
    if len(record.variants) <= _COLUMNS:
        members = next(iter(record.clusters.values()), {})
        table = by_client(record)
        cluster = ["cluster"] if members else []
        rows = [[row[0], *(Cell(str(members.get(row[0].text, ""))) for _ in cluster), *row[1:]] for row in table.rows]
        _show_grid(console, Grid(table.title, [table.head[0], *cluster, *table.head[1:]], rows))
    _show_grid(console, brief(record))
    for note in notes(record):
        console.print(note, highlight=False, markup=False)


def _show_grid(console: Console, grid: Grid) -> None:
    heading(console, grid.title)
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(grid.head):
        table.add_column(escape(name), justify="right" if i else "left", no_wrap=not i)
    for row in grid.rows:
        table.add_row(*(f"[bold]{escape(cell.text)}[/]" if cell.best else escape(cell.text) for cell in row))
    console.print(table)
