"""The display of a run: live bars on a terminal, plain lines elsewhere, and the table at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from coterie.cli.console import heading
from coterie.cli.plain import escape
from coterie.cli.position import Position
from coterie.methods.findings import Clusters, find, read
from coterie.runs.events import (
    CheckpointSaved,
    ClientDone,
    ClientEvaluated,
    ClientSteps,
    Evaluated,
    Event,
    Listener,
    Note,
    Ready,
    Resumed,
    RoundDone,
    RoundStart,
    Scores,
)
from coterie.runs.folder import REPORT
from coterie.runs.health import named
from coterie.runs.summary import Summary
from coterie.units import clock, size

_EVERY = 30.0  # seconds


@contextmanager
def listener(console: Console, rounds: int, label: str = "") -> Iterator[Listener]:
    """A listener that shows a run on ``console``: live on a terminal; elsewhere lines, at least every half minute as
    long as clients move on."""
    if not console.is_terminal:
        yield Lines(console, rounds, label, every=_EVERY)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label or "round", total=rounds, now="", left="")
        yield Live(Lines(console, rounds, label), progress, bar)


@contextmanager
def lines(console: Console, rounds: int, label: str = "") -> Iterator[Listener]:
    """A listener that shows a run on ``console`` as lines: several runs may be shown at the same time."""
    yield Lines(console, rounds, label)


@dataclass
class Lines:
    """A line per round and evaluation, with its loss, throughput and the time left.

    Where nothing was said for ``every`` seconds, a line says where the round is.
    """

    console: Console
    rounds: int
    label: str = ""
    done: list[float] = field(default_factory=list)
    began: float = 0.0
    every: float = math.inf
    last: float = field(default_factory=lambda: time.perf_counter())
    position: Position = field(default_factory=Position)

    def __call__(self, event: Event) -> None:
        if self.position(event) and time.perf_counter() - self.last >= self.every:
            self._say(f"round {self.position.round}/{self.rounds}  {self.position}")
        match event:
            case Ready():
                self._say(f"{event.clients} clients, {event.rounds} rounds, in {event.folder}")
            case Resumed():
                self._say(f"continues after round {event.round}")
            case Note():
                self._say(f"note: {event.text}")
            case RoundStart():
                self.began = time.perf_counter()
            case RoundDone():
                self._say(self._round(event))
                if choice := _choice(event):
                    self._say(choice)
            case Evaluated():
                self._say(f"round {event.round}/{self.rounds}  {_means(event.mean)}")
            case CheckpointSaved() if event.round:
                self.done.append(time.perf_counter() - self.began)

    def left(self, rnd: int) -> float | None:
        """Seconds that the rounds after ``rnd`` may take; None before the first is done."""
        return sum(self.done) / len(self.done) * (self.rounds - rnd) if self.done else None

    def _round(self, event: RoundDone) -> str:
        rate = event.tokens / max(event.seconds, 1e-9)
        text = f"round {event.round}/{self.rounds}  loss {_loss(event.loss)}  {rate:,.0f} tokens/s"
        left = self.left(event.round - 1)
        if left is not None:  # the evaluation of this round is still to come
            text += f"  {clock(max(0.0, left - (time.perf_counter() - self.began)))} left"
        return text + "".join(f"\n  left out {named(client, reason)}" for client, reason in event.failed.items())

    def _say(self, text: str) -> None:
        self.last = time.perf_counter()
        prefix = f"{self.label}: " if self.label else ""
        self.console.print(escape(prefix + text), highlight=False, soft_wrap=True)


@dataclass
class Live:
    """The same lines above two live bars: of the rounds, which names the client at work, and of the clients and steps
    within the round."""

    lines: Lines
    progress: Progress
    bar: TaskID
    todo: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.within = self.progress.add_task("", total=None, visible=False, now="", left="")

    def __call__(self, event: Event) -> None:
        self.lines(event)
        self._move(event)
        match event:
            case RoundStart():
                self.todo, self.losses = list(event.clients), []
                self.progress.update(self.bar, completed=event.round - 1, now=escape(self.todo[0]))
            case ClientDone():
                self._client(event)
            case ClientEvaluated():
                self.progress.update(self.bar, now=f"evaluating {escape(event.client)}")
            case CheckpointSaved():
                left = self.lines.left(event.round)
                text = f"{clock(left)} left" if left else ""
                self.progress.update(self.bar, completed=event.round, left=text)

    def _move(self, event: Event) -> None:
        """Move the bar of the round."""
        position = self.lines.position
        if isinstance(event, (RoundStart, ClientSteps, ClientDone, ClientEvaluated)):
            step = escape(position.step)
            self.progress.update(
                self.within, description=f"  {position.doing}", total=position.clients, completed=position.share,
                now=step, visible=True,
            )  # fmt: skip
        elif isinstance(event, CheckpointSaved):
            self.progress.update(self.within, visible=False)

    def _client(self, event: ClientDone) -> None:
        self.todo.remove(event.client)
        self.losses += [event.entry.loss] if event.entry.loss is not None else []
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        rate = event.entry.tokens / max(event.entry.seconds, 1e-9)
        at_work = escape((self.todo or [event.client])[0])
        self.progress.update(self.bar, now=f"{at_work}  loss {_loss(loss)}  {rate:,.0f} tokens/s")


def show_summary(console: Console, summary: Summary, folder: Path) -> None:
    """Show a finished run: a row per client, the mean, the cost, and where the report is."""
    names = sorted({name for row in summary.clients.values() for name in row.test})
    heading(console, f"{summary.title}: test at round {summary.best_round}")
    table = Table(box=None, header_style="bold")
    clusters = find(summary.findings, Clusters)
    for column in ("client", *(["cluster"] if clusters else []), "train rows", *names):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client, row in summary.clients.items():
        cluster = [str(clusters.members.get(client, "-"))] if clusters else []
        table.add_row(escape(client), *cluster, str(row.num_train), *(_cell(row.test.get(n)) for n in names))
    mean = summary.mean.get("test", {})
    table.add_section()
    table.add_row("mean", *([""] if clusters else []), "", *(_cell(mean.get(n)) for n in names), style="bold")
    console.print(table)
    console.print(
        f"{summary.rounds} rounds in {clock(summary.seconds)}, {size(summary.bytes.up)} up, "
        f"{size(summary.bytes.down)} down, peak memory {size(summary.peak_memory_bytes)}",
        highlight=False,
    )
    if summary.exported_round is not None:
        console.print(f"experts and bundles: round {summary.exported_round}", highlight=False)
    console.print(f"report: {folder / REPORT}", highlight=False, soft_wrap=True)


def _choice(event: RoundDone) -> str:
    """How many clusters there are from this round on, if the round formed them by their silhouettes."""
    clusters = read(Clusters, event.describe)
    return clusters.choice if clusters else ""


def _loss(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"


def _means(mean: Scores) -> str:
    return "  ".join(
        f"{split}: " + " ".join(f"{name} {_cell(value)}" for name, value in sorted(metrics.items()))
        for split, metrics in sorted(mean.items())
    )


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
