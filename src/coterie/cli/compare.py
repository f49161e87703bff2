"""The table that ``coterie compare`` and ``coterie demo`` end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coterie.cli.console import heading
from coterie.comparison.figures import Comparison, record_of
from coterie.comparison.record import Figures, Record
from coterie.units import size


def show(console: Console, comparison: Comparison, folder: Path, target: float | None = None) -> None:
    """The tables: a row per client, a column per method, the best in bold; then means, worst clients and bytes.

    After them, which runs have no result, and the reason.
    """
    if comparison.done:
        show_record(console, record_of(comparison, target))
        console.print(f"each run has a report.html; see {folder}", highlight=False, soft_wrap=True)
    for entry in comparison.missing:
        what = f"{entry.variant} {' '.join([*entry.settings, ''])}seed {entry.seed}"
        text = f"[bold yellow]no result:[/] {escape(what)}: {escape(entry.why)}: {escape(entry.reason)}"
        console.print(text, highlight=False, soft_wrap=True)


def show_record(console: Console, record: Record) -> None:
    """The tables of a record."""
    rows = record.variants
    members = next(iter(record.clusters.values()), {})
    heading(console, f"Test {record.primary} at the round that validation chose")
    table = Table(box=None, header_style="bold")
    table.add_column("client")
    for column in (*(["cluster"] if members else []), *(row.title for row in rows.values())):
        table.add_column(column, justify="right")
    for client in dict.fromkeys(client for row in rows.values() for client in row.clients):
        cluster = [str(members.get(client, "-"))] if members else []
        table.add_row(escape(client), *cluster, *_best([r.clients.get(client) for r in rows.values()], record.primary))
    table.add_section()
    space = [""] if members else []
    table.add_row("mean", *space, *_best([row.mean for row in rows.values()], record.primary))
    if any(len(row.seeds) > 1 for row in rows.values()):
        table.add_row("spread over seeds", *space, *(f"{row.std:.3f}" for row in rows.values()))
    table.add_row("worst client", *space, *_best([row.worst for row in rows.values()], record.primary))
    table.add_row("sent", *space, *(size(row.bytes) for row in rows.values()))
    console.print(table)
    _say_unlike(console, rows)


def _say_unlike(console: Console, rows: Mapping[str, Figures]) -> None:
    """Say where variants are not compared under the same conditions."""
    if len({row.evaluated for row in rows.values()}) > 1:
        mixed = "; ".join(f"{row.title}: {row.evaluated}" for row in rows.values())
        console.print(
            f"the methods are evaluated differently ({mixed}): received is what the server sends, trained is what a "
            "client trained last; --set run.evaluate=trained (or received) evaluates all the same way",
            highlight=False,
            markup=False,
        )
    if len({tuple(row.seeds) for row in rows.values()}) > 1:
        seeds = "; ".join(f"{row.title}: {', '.join(map(str, row.seeds))}" for row in rows.values())
        console.print(f"the methods have different seeds ({seeds})", highlight=False, markup=False)
    for row in rows.values():
        if row.tuned:
            edge = f", at the edge of the grid: {', '.join(row.tuned.at_edge)}" if row.tuned.at_edge else ""
            text = f"{row.title}: tuned to {', '.join(row.tuned.settings)}{edge}"
            console.print(text, highlight=False, markup=False)


def _best(values: Sequence[float | None], metric: str) -> list[str]:
    known = [value for value in values if value is not None]
    best = (min if metric == "loss" else max)(known, default=None)
    return ["-" if value is None else f"[bold]{value:.3f}[/]" if value == best else f"{value:.3f}" for value in values]
