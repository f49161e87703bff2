"""The table that ``coterie compare`` and ``coterie demo`` end with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coterie.cli.console import heading
from coterie.comparison import Results, clusters_of, table_of, title_of
from coterie.units import size


def show(console: Console, results: Results, folder: Path) -> None:
    """The table: a row per client, a column per method, the best in bold; then means, worst clients and bytes."""
    rows = table_of(results)
    first = next(iter(rows.values()))
    _, clusters = clusters_of(results) or ("", None)
    members = clusters.members if clusters else {}
    heading(console, f"Test {first.primary} at the round that validation chose")
    table = Table(box=None, header_style="bold")
    table.add_column("client")
    for column in (*(["cluster"] if members else []), *map(title_of, rows)):
        table.add_column(column, justify="right")
    for client in first.clients:
        cluster = [str(members.get(client, "-"))] if members else []
        table.add_row(escape(client), *cluster, *_best([row.clients[client] for row in rows.values()], first.primary))
    table.add_section()
    space = [""] if members else []
    table.add_row("mean", *space, *_best([row.mean for row in rows.values()], first.primary))
    if len(first.seeds) > 1:
        table.add_row("spread over seeds", *space, *(f"{row.std:.3f}" for row in rows.values()))
    table.add_row("worst client", *space, *_best([row.worst for row in rows.values()], first.primary))
    table.add_row("sent", *space, *(size(row.bytes) for row in rows.values()))
    console.print(table)
    if len({row.evaluated for row in rows.values()}) > 1:
        mixed = "; ".join(f"{title_of(m)}: {row.evaluated}" for m, row in rows.items())
        console.print(
            f"the methods are evaluated differently ({mixed}): received is what the server sends, trained is what a "
            "client trained last; --set run.evaluate=trained (or received) evaluates all the same way",
            highlight=False,
            markup=False,
        )
    console.print(f"each run has a report.html; see {folder}", highlight=False, soft_wrap=True)


def _best(values: Sequence[float | None], metric: str) -> list[str]:
    known = [value for value in values if value is not None]
    best = (min if metric == "loss" else max)(known, default=None)
    return ["-" if value is None else f"[bold]{value:.3f}[/]" if value == best else f"{value:.3f}" for value in values]
