"""What all commands share: the console, tables, options, and what Ctrl-C leaves behind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from coterie.cli.plain import escape, one_line
from coterie.text import printable

_LINE = 120  # characters of the line that names a key

out = Console(emoji=False)  # used as ``console.out``, so that a test can replace it in one place

Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, overrides the file; repeatable")]
Out = Annotated[Path | None, typer.Option("--out", help="the run's folder; default runs/NAME-METHOD-SEED")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
Markdown = Annotated[bool, typer.Option(help="print a Markdown table, as in the docs")]


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C in a command that can be continued later. Its text says how."""


@contextmanager
def resumable(folder: Path, how: str) -> Iterator[None]:
    """Turn Ctrl-C into :class:`Interrupted`, which says what ``folder`` contains and ``how`` to continue."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(_kept(folder, how)) from stop


def _kept(folder: Path, how: str) -> str:
    def holds(what: str) -> bool:
        return any(folder.glob(what)) or any(folder.glob(f"*/{what}"))

    if holds("checkpoints/*.ckpt"):
        return f"stopped; the last checkpoint is kept: {how}"
    return f"stopped before the first checkpoint: {how}" if holds("config.json") else "stopped; nothing was written"


def default_folder(name: str, method: object, seed: int) -> Path:
    """The folder of a run without ``--out``."""
    return Path("runs") / f"{name}-{method}-{seed}"


def say(text: str) -> None:
    """Print ``text`` as it is: no markup, no colours, no line breaks."""
    out.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def prose(text: str) -> None:
    """Print ``text`` with line breaks between words only: a name or a path that is longer than a line stays whole."""
    say(textwrap.fill(printable(text), out.width, break_long_words=False, break_on_hyphens=False))


def show_aligned(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print ``rows`` under ``columns`` in their full width, also on a narrower terminal. The first column is text."""
    lines = [columns, *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for number, row in enumerate(lines):
        padded = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + padded[0], *(space + cell for cell, space in zip(row[1:], padded[1:], strict=True))]
        out.print("  ".join(cells), style=None if number else "bold", markup=False, highlight=False, soft_wrap=True)


def heading(console: Console, text: str) -> None:
    """Print a line above a table. The table's own title would be folded to the table's width."""
    console.print(f"\n[bold]{escape(text)}[/]", highlight=False, soft_wrap=True)


def show_keys(rows: Sequence[tuple[str, str, str, str]], markdown: bool) -> None:
    """Print the (key, type, default, meaning) of settings, with the meaning on its own lines; or a Markdown table."""
    if markdown:
        show_table(("key", "type", "default", "meaning"), rows, markdown)
        return
    for key, kind, default, meaning in rows:
        default = default if default == "required" else f"default {default}"
        if len(f"{key}  {kind}  {default}") <= _LINE:
            out.print(f"[bold]{escape(key)}[/]  {escape(kind)}  {escape(default)}", highlight=False, soft_wrap=True)
        else:
            out.print(f"[bold]{escape(key)}[/]  {escape(default)}", highlight=False, soft_wrap=True)
            out.print(Padding(escape(kind), (0, 0, 0, 4), expand=False), highlight=False)
        out.print(Padding(escape(meaning), (0, 0, 0, 4), expand=False), highlight=False)


def show_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], markdown: bool) -> None:
    """Print ``rows`` under ``columns``, as a table or as Markdown."""
    if markdown:
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        print("\n".join(lines))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


def show_checks(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print the (mark, name, value, fix) of checks; the mark is markup, the rest is not."""
    table = Table(box=None, header_style="bold")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for mark, *cells in rows:
        table.add_row(mark, *map(escape, cells))
    out.print(table)
