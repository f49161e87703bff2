"""The command line: every command, and how each of them ends."""

from __future__ import annotations

import os
import sys

# Before torch loads OpenMP: threads that wait for work soon sleep. By default they spin, and on a busy machine
# take cores from threads that work (docs/performance.md has figures).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import click
import typer
from rich.console import Console

from coterie.cli import about, api, federation, history, pool, runs, use
from coterie.cli.console import Interrupted
from coterie.cli.plain import escape
from coterie.types import CoterieError

_USER_ERROR, _INTERRUPTED = 2, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of Hugging Face language models with mixtures of LoRA experts.",
)
runs.register(app)
use.register(app)
history.register(app)
about.register(app)
app.add_typer(pool.app, name="pool")
federation.register(app)
api.register(app)


def main() -> None:
    """The console command: a user's error is a line or two with exit code 2, Ctrl-C exits with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns Ctrl-C into an exit code
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except CoterieError as fault:
        errors.print(f"[bold red]error:[/] {escape(str(fault))}")
        sys.exit(_USER_ERROR)
    except OSError as fault:
        errors.print(f"[bold red]error:[/] {escape(f'{fault.filename}: {fault.strerror}')}")
        sys.exit(_USER_ERROR)
    except Interrupted as stop:
        errors.print(f"\n{stop}")
        sys.exit(_INTERRUPTED)
    except (KeyboardInterrupt, click.exceptions.Abort):
        errors.print("\nstopped")
        sys.exit(_INTERRUPTED)
    except click.exceptions.ClickException as fault:
        hinted = "Did you mean" in fault.message  # typer adds the hint, and click would repeat it
        errors.print(f"[bold red]error:[/] {escape(fault.message if hinted else fault.format_message())}")
        sys.exit(fault.exit_code)
