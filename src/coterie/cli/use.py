"""The commands that use what a run leaves: ``predict``, ``evaluate``, ``export``, ``onboard`` and ``push``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn, TimeElapsedColumn

from coterie.text import printable
from coterie.types import CoterieError

if TYPE_CHECKING:
    from coterie.artifacts.card import Form
    from coterie.artifacts.predict import Progress
    from coterie.data.settings import Columns

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run, or of a bundle")]
Client = Annotated[str | None, typer.Option(help="whose model; not needed for the folder of a bundle")]
BaseFolder = Annotated[str | None, typer.Option("--base", help="the base's folder, if it is not where it was")]
Device = Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="role=name, as in text=body or template='{question}'; default the run's; repeatable"),
]
SHOWN = 20  # reasons of rows without an answer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (predict, evaluate, export, onboard, push):
        app.command()(command)


def predict(
    run: Run,
    file: Annotated[str, typer.Argument(help="rows: .jsonl, .csv or .parquet; - for standard input")],
    client: Client = None,
    out: Annotated[Path | None, typer.Option(help="write here, .jsonl or .csv; default standard output")] = None,
    reads: Annotated[str, typer.Option("--input-format", help="of standard input: jsonl or csv")] = "jsonl",
    writes: Annotated[str, typer.Option("--format", help="of the answers: jsonl or csv; default by --out")] = "",
    column: Column = None,
    prefix: Annotated[str, typer.Option(help="the beginning of the names of the answer's columns")] = "",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="rows per forward pass; default 16, on a GPU 64")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="generation; default the run's")] = None,
    base: BaseFolder = None,
    device: Device = "cpu",
) -> None:
    """Answer rows with a client's model: labels, texts or choices. Exits with 1 where rows have no answer."""
    from coterie.adapters.model import bundle_folder
    from coterie.artifacts.load import load
    from coterie.artifacts.predict import predict_file

    bundle_folder(run, client)  # the model for someone new is for programs: here a client's name is easily forgotten
    model = load(run, client, base=base, device=device)
    predictor = model.predictor(
        columns=with_columns(model.columns, column or ()), batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    console = Console(stderr=True, emoji=False)
    rejected: list[str] = []
    with _watching(console) as watch:
        done = predict_file(
            predictor, file, out, reads=reads, writes=writes, prefix=prefix, watch=watch,
            reject=lambda reason: _note(console, rejected, reason),
        )  # fmt: skip
    answered = done.rows - done.rejected
    _tell(console, f"{answered} of {done.rows} rows answered" + (f": {out}" if out else ""))
    if done.rejected:
        if done.rejected > SHOWN:
            _tell(console, f"{done.rejected - SHOWN} more rows have no answer")
        raise typer.Exit(1)


def evaluate(
    run: Run,
    client: Client = None,
    data: Annotated[Path | None, typer.Option(help="labelled rows; default the client's own in the run")] = None,
    split: Annotated[
        str | None, typer.Option(help="of the client's own rows: test, validation or train; default test")
    ] = None,
    cross: Annotated[
        bool, typer.Option("--cross", help="every client's model on the test rows of all with the same labels")
    ] = False,
    metric: Annotated[str, typer.Option(help="with --cross; default what validation chose by")] = "",
    column: Column = None,
    out: Annotated[Path | None, typer.Option(help="also write the figures as JSON")] = None,
    base: BaseFolder = None,
    device: Annotated[str | None, typer.Option(help="where to compute; default as the run did")] = None,
) -> None:
    """Score a client's model on labelled rows: the metrics of training, the confusion matrix, the calibration."""
    from coterie.artifacts.evaluate import evaluate as score
    from coterie.artifacts.evaluate import plain
    from coterie.artifacts.load import reading_of
    from coterie.cli.evaluation import show_cross, show_evaluation
    from coterie.files import write_json

    if cross:
        given = {"--client": client, "--data": data, "--split": split, "--column": column, "--out": out,
                 "--base": base, "--device": device}  # fmt: skip
        if useless := [name for name, value in given.items() if value]:
            raise CoterieError(
                "--cross scores every model on the run's own test rows, as the run did, and writes cross.json; leave "
                f"out {', '.join(useless)}"
            )
        show_cross(run, metric)
        return
    if metric:
        raise CoterieError("--metric chooses what --cross shows; add --cross, or leave out --metric")
    columns = with_columns(reading_of(run, client or "")[0], column) if column else None
    result = score(run, client, data=data, split=split, columns=columns, base=base, device=device)
    show_evaluation(result)
    if out:
        write_json(out, plain(result))


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="the folder to write, new or empty")],
    client: Client = None,
    static: Annotated[bool, typer.Option("--static", help="one static LoRA in PEFT's format")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="the base's weights with it, as a transformers folder")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="cut it to this rank; default all experts' ranks")] = None,
    data: Annotated[Path | None, typer.Option(help="labelled rows to weigh experts by; default the client's")] = None,
    language: Annotated[list[str] | None, typer.Option(help="for the model card, as in en; repeatable")] = None,
    base: BaseFolder = None,
    device: Annotated[str | None, typer.Option(help="where to compute; default as the run did")] = None,
) -> None:
    """Write a client's model with a model card: its bundle, one static LoRA, or merged weights."""
    from coterie.artifacts.export import export as write
    from coterie.cli.evaluation import show_export

    if static and merge:
        raise CoterieError("--static writes a LoRA and --merge whole weights; give one of the two")
    if rank and not (static or merge):
        raise CoterieError("--rank cuts a static LoRA; add --static or --merge")
    form: Form = "static" if static else "merged" if merge else "bundle"
    command = shlex.join(["coterie", *sys.argv[1:]])
    made = write(run, client, out, form=form, rank=rank, data=data, base=base, device=device,
                 language=language or (), command=command)  # fmt: skip
    show_export(made)


def onboard(
    run: Run,
    data: Annotated[Path, typer.Option(help="the new client's folder, with train.jsonl, .csv or .parquet")],
    out: Annotated[Path, typer.Option(help="the folder of its bundle, new or empty")],
    client: Annotated[str, typer.Option(help="its name; default the name of its folder")] = "",
    epochs: Annotated[int, typer.Option(min=1, help="of the router and the head over its training rows")] = 10,
    column: Column = None,
    base: BaseFolder = None,
    device: Annotated[str | None, typer.Option(help="where to compute; default as the run did")] = None,
) -> None:
    """Give a client that was not there a model of a finished run: experts frozen, router and head trained."""
    from coterie.artifacts.load import reading_of
    from coterie.artifacts.onboard import onboard as join
    from coterie.cli.evaluation import show_joined

    columns = with_columns(reading_of(run, "")[0], column) if column else None
    joined = join(run, data, out, client=client, epochs=epochs, columns=columns, base=base, device=device)
    show_joined(joined, out)


def push(
    folder: Annotated[Path, typer.Argument(help="what `coterie export` wrote")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME; made if it is not there")],
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; default private")] = False,
    message: Annotated[str, typer.Option(help="of the commit")] = "",
) -> None:
    """Upload an export with its model card to the Hugging Face hub. Read the card first: it names client and labels."""
    from coterie.artifacts.push import push as upload
    from coterie.cli.console import say

    say(f"pushed: {upload(folder, repo, public=public, message=message)}")


def with_columns(columns: Columns | None, overrides: Sequence[str]) -> Columns | None:
    """``columns`` with every ``role=name`` set; where they are not known (None), the defaults with these.

    Raises :class:`CoterieError` for an unknown role.
    """
    from coterie.config.check import checked
    from coterie.data.settings import Columns

    if not overrides:
        return columns
    given = dict(columns.model_dump(exclude_unset=True)) if columns else {}
    for text in overrides:
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise CoterieError(f"--column {text!r} is not of the form role=name")
        given[role.strip()] = name
        if role.strip() == "template":
            given.pop("prompt", None)
    return checked(Columns, given, "data.columns")


def _note(console: Console, rejected: list[str], reason: str) -> None:
    """Show the first reasons; the others are counted."""
    if len(rejected) < SHOWN:
        rejected.append(reason)
        _tell(console, reason)


def _tell(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _watching(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A count of rows on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield lambda progress: None
        return
    with Bar(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("0 rows")
        yield lambda progress: bar.update(task, description=f"{progress.rows:,} rows")
