"""The command line: ``coterie run``, ``compare``, ``demo``, ``methods``, ``config``, ``doctor``, ``report``, ..."""

from __future__ import annotations

import logging
import os
import sys

# Before torch loads OpenMP: threads that wait for work sleep soon. Left to themselves they spin, which takes the cores
# of a busy machine from those that work (docs/performance.md has figures).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from coterie import __version__
from coterie.cli import federation as commands
from coterie.cli import pool as cli_pool
from coterie.types import CoterieError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of Hugging Face language models with mixtures of LoRA experts.",
)
app.add_typer(cli_pool.app, name="pool")
out = Console(emoji=False)
_INTERRUPTED = 130
commands.register(app)

Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, on top of the file; repeatable")]


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="TOML file; may be left out with --resume")] = None,
    overrides: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="the run's folder; runs/NAME-METHOD-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
    engine: Annotated[str | None, typer.Option(help="the same as --set engine.name=...: local or flower-sim")] = None,
) -> None:
    """Run one method on one federation."""
    from coterie.cli.progress import listener, show_summary
    from coterie.config.run import check_config, load_config, override
    from coterie.experiment import federate
    from coterie.run.folder import read_run

    overrides = [*(overrides or ()), *([f"engine.name={engine}"] if engine else [])]
    if config is None:
        if not (resume and folder):
            raise CoterieError("give a config file, or --resume with --out and the run's folder")
        raw, root = read_run(folder)
        settings = check_config(override(raw, overrides))
    else:
        settings, root = load_config(config, overrides), config.parent
    place = folder or _default_folder(config, settings.method.get("name", "fedlease"), settings.run.seed)
    with goes_on(place, "go on with the same command and --resume"), listener(out, settings.run.rounds) as listen:
        summary = federate(settings, place, root=root, resume=resume, listen=listen)
    show_summary(out, summary, place)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="the TOML file that all runs share")],
    methods: Annotated[
        str, typer.Option(help="methods, with commas between; fedamole:assignment=static sets one's own")
    ] = "fedlease,fedit,local",
    seeds: Annotated[str, typer.Option(help="seeds, with commas between them")] = "0",
    overrides: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="folder for all runs; default runs/NAME")] = None,
) -> None:
    """Run several methods on the same federation, and show them side by side. Goes on where it was stopped."""
    from coterie.cli.compare import show
    from coterie.cli.progress import listener
    from coterie.compare import compare as run_all

    place = folder or Path("runs") / config.stem
    seed_numbers = [_seed(text) for text in seeds.split(",")]
    with goes_on(place, "go on with the same command"):
        results = run_all(config, methods.split(","), seed_numbers, place, overrides or (), partial(listener, out))
    show(out, results, place)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="where the demo's runs and pictures go")] = Path("runs/demo"),
) -> None:
    """FedLEASE, FedIT and local on a federation of organisations with different jobs, in a few minutes."""
    from coterie.cli.demo import run_demo

    run_demo(folder, out)


@app.command()
def methods(markdown: Annotated[bool, typer.Option(help="as the table of the docs")] = False) -> None:
    """The methods there are."""
    from coterie.methods.base import methods as known

    rows = [(name, method.title, method.summary, method.paper) for name, method in known().items()]
    show_table(("name", "method", "what it does", "source"), rows, markdown)


@app.command("config")
def show_config(
    method: Annotated[str | None, typer.Option(help="show the settings of this method only")] = None,
    markdown: Annotated[bool, typer.Option(help="as the table of the docs")] = False,
) -> None:
    """Every key of a config: type, default, meaning."""
    from coterie.config.run import describe_config

    show_keys(list(describe_config(method)), markdown)


@app.command()
def doctor() -> None:
    """What this machine has, what is missing, and the command that mends it. Touches no network."""
    from coterie.cli.doctor import examine

    table = Table(box=None, header_style="bold")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in examine():
        cells = map(escape, (check.name, check.value, check.fix))  # brackets in them are no markup
        table.add_row("[green]ok[/]" if check.ok else "[yellow]--[/]", *cells)
    out.print(table)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    pictures: Annotated[bool, typer.Option("--pictures", help="also write each picture as a PNG")] = False,
) -> None:
    """Write the report of a run anew, finished or not."""
    from coterie.deploy.journal import JOURNAL
    from coterie.report.page import write_report
    from coterie.run.folder import read_run

    read_run(folder)
    if (folder / JOURNAL).exists():
        from coterie.deploy.server import write_sites

        write_sites(folder)
    out.print(f"report: {write_report(folder, pictures)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def version() -> None:
    """The version."""
    out.print(__version__)


def main() -> None:
    """The console command: user faults in a line or two with exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
    errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer makes an exit code of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except CoterieError as fault:
        errors.print(f"[bold red]error:[/] {escape(str(fault))}")
        sys.exit(2)
    except OSError as fault:
        errors.print(f"[bold red]error:[/] {escape(f'{fault.filename}: {fault.strerror}')}")
        sys.exit(2)
    except Interrupted as stop:
        errors.print(f"\n{stop}")
        sys.exit(_INTERRUPTED)
    except (KeyboardInterrupt, click.exceptions.Abort):
        errors.print("\nstopped")
        sys.exit(_INTERRUPTED)
    except click.exceptions.ClickException as fault:
        hinted = "Did you mean" in fault.message  # by typer, and click would say it again
        errors.print(f"[bold red]error:[/] {escape(fault.message if hinted else fault.format_message())}")
        sys.exit(fault.exit_code)


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C in a command that can go on later. Its text says how."""


@contextmanager
def goes_on(folder: Path, how: str) -> Iterator[None]:
    """Turn Ctrl-C into :class:`Interrupted` that says what is kept in ``folder``, or below it, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(_kept(folder, how)) from stop


def _kept(folder: Path, how: str) -> str:
    def holds(what: str) -> bool:
        return any(folder.glob(what)) or any(folder.glob(f"*/{what}"))

    if holds("checkpoints/*.ckpt"):
        return f"stopped; the last checkpoint is kept: {how}"
    return f"stopped before the first checkpoint: {how}" if holds("config.json") else "stopped; nothing was begun"


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise CoterieError(f"--seeds takes whole numbers with commas between them, not {text!r}")
    return int(text)


def _default_folder(config: Path | None, method: object, seed: int) -> Path:
    return Path("runs") / f"{config.stem if config else 'run'}-{method}-{seed}"


def show_keys(rows: Sequence[tuple[str, str, str, str]], markdown: bool) -> None:
    """Print (key, type, default, meaning) of settings, the meaning below the rest; or the Markdown of a page."""
    if markdown:
        show_table(("key", "type", "default", "meaning"), rows, markdown)
        return
    for key, kind, default, meaning in rows:
        told = "" if default == "required" else "default "
        out.print(f"[bold]{escape(key)}[/]  {escape(kind)}  {told}{escape(default)}", highlight=False, soft_wrap=True)
        out.print(Padding(escape(meaning), (0, 0, 0, 4), expand=False), highlight=False)


def show_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], markdown: bool) -> None:
    """Print rows under ``columns``, or as the Markdown of a page of the docs."""
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
