"""The commands that look back: ``runs`` and ``diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import console
from coterie.cli.console import heading, say, show_aligned

Where = Annotated[list[str] | None, typer.Option("--where", help="section.key=value of their settings; repeatable")]
Folder = Annotated[Path, typer.Argument(help="a folder with runs in it or below it")]
_LONGEST = 60  # characters of a value


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (runs, diff):
        app.command()(command)


def runs(
    folder: Folder = Path("runs"),
    where: Where = None,
    sort: Annotated[str, typer.Option(help="run, method, seed, state, metric, test, worst or bytes")] = "run",
) -> None:
    """List the runs in a folder: method, seed, state, and the mean and the worst client's test metric."""
    from coterie.artifacts.history import COLUMNS, chosen, runs_in
    from coterie.comparison.tables import number
    from coterie.report.tables import MISSING, words
    from coterie.units import size

    rows, found = [], runs_in(folder)
    for entry in chosen(found, where or (), sort):
        known = [entry.method, str(entry.seed)] if entry.settings else [MISSING, MISSING]
        row = [str(entry.folder), *known, entry.state]
        if summary := entry.summary:
            worst = number(summary.worst.value if summary.worst else None, summary.primary)
            row += [words(summary.primary), number(entry.test, summary.primary), worst]
            row += [size(summary.bytes.up + summary.bytes.down)]
        else:
            row += [MISSING] * 4
        rows.append(tuple(row))
    show_aligned(COLUMNS, rows)
    for entry in found:
        if entry.fault:
            say(f"note: {entry.fault}")


def diff(
    one: Annotated[Path, typer.Argument(help="the folder of a run")],
    other: Annotated[Path, typer.Argument(help="the folder of another")],
) -> None:
    """Show what two runs differ in: settings, data and results."""
    from coterie.artifacts.history import differences

    for what, found in differences(one, other).items():
        heading(console.out, what)
        if not found:
            say("no difference")
            continue
        rows = [(of.name, _cut(of.before), _cut(of.after)) for of in found]
        show_aligned(("", str(one), str(other)), rows)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
