"""The commands that answer questions: ``methods``, ``config``, ``doctor`` and ``version``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie import __version__
from coterie.cli import console
from coterie.cli.console import Markdown, show_checks, show_keys, show_table


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(methods)
    app.command("config")(show_config)
    app.command()(doctor)
    app.command()(version)


def methods(
    markdown: Markdown = False,
    releases: Annotated[bool, typer.Option(help="what each lets leave a client, and how it is protected")] = False,
) -> None:
    """List the methods."""
    if releases:
        from coterie.config.released import HEAD, INTRO, table

        for text in INTRO if markdown else ():
            print(f"{text}\n")
        show_table(HEAD, table(), markdown)
        return
    from coterie.methods.registry import methods as known

    rows = [(name, method.title, method.summary, method.paper) for name, method in known().items()]
    show_table(("name", "method", "what it does", "source"), rows, markdown)


def show_config(
    method: Annotated[str | None, typer.Option(help="only the settings of this method")] = None,
    markdown: Markdown = False,
) -> None:
    """List every key of a config with its type, default and meaning."""
    from coterie.config.describe import describe_config

    show_keys(list(describe_config(method)), markdown)


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="say what the run of this config takes on this machine, and change nothing")
    ] = None,
) -> None:
    """Say what this machine has, what is missing, and the command that fixes it. Uses no network."""
    from coterie.cli.doctor import examine, planned

    marks = {True: "[green]ok[/]", False: "[yellow]--[/]"}
    checks = examine() if config is None else planned(config)
    show_checks([(marks[check.ok], check.name, check.value, check.fix) for check in checks])


def version() -> None:
    """Print the version."""
    console.out.print(__version__)
