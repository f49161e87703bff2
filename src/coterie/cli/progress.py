"""What a person sees of a run: a live line on a terminal, plain lines elsewhere, and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from coterie.cli.console import heading
from coterie.runs.rounds import Listener, named
from coterie.types import Json
from coterie.units import clock, size


@contextmanager
def listener(console: Console, rounds: int, label: str = "") -> Iterator[Listener]:
    """A listener that shows a run on ``console``: live on a terminal, a line per round elsewhere."""
    if not console.is_terminal:
        yield Lines(console, rounds, label)
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


@dataclass
class Lines:
    """A line per round and evaluation, with its loss, throughput and the time left."""

    console: Console
    rounds: int
    label: str = ""
    done: list[float] = field(default_factory=list)
    began: float = 0.0

    def __call__(self, event: dict[str, Json]) -> None:
        match event["event"]:
            case "ready":
                self._say(f"{event['clients']} clients, {event['rounds']} rounds, in {event['folder']}")
            case "resumed":
                self._say(f"goes on after round {event['round']}")
            case "note":
                self._say(f"note: {event['text']}")
            case "start":
                self.began = time.perf_counter()
            case "round":
                self._say(self._round(event))
            case "evaluation":
                self._say(f"round {event['round']}/{self.rounds}  {_means(event['mean'])}")
            case "checkpoint" if event["round"]:
                self.done.append(time.perf_counter() - self.began)

    def left(self, rnd: int) -> float | None:
        """Seconds that the rounds after ``rnd`` may take; None before the first is done."""
        return sum(self.done) / len(self.done) * (self.rounds - rnd) if self.done else None

    def _round(self, event: dict[str, Json]) -> str:
        entries = event["clients"].values()
        tokens = sum(entry.get("tokens", 0) for entry in entries)
        rate = tokens / max(event["seconds"], 1e-9)
        text = f"round {event['round']}/{self.rounds}  loss {_mean_loss(event):.3f}  {rate:,.0f} tokens/s"
        left = self.left(event["round"] - 1)
        if left is not None:  # of this round, the evaluation is still to come
            text += f"  {clock(max(0.0, left - (time.perf_counter() - self.began)))} left"
        return text + "".join(f"\n  left out {named(client, reason)}" for client, reason in event["failed"].items())

    def _say(self, text: str) -> None:
        prefix = f"{self.label}: " if self.label else ""
        self.console.print(escape(prefix + text), highlight=False, soft_wrap=True)


@dataclass
class Live:
    """The same lines above a live bar that names the client at work."""

    lines: Lines
    progress: Progress
    bar: TaskID
    todo: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __call__(self, event: dict[str, Json]) -> None:
        self.lines(event)
        match event["event"]:
            case "start":
                self.todo, self.losses = list(event["clients"]), []
                self.progress.update(self.bar, completed=event["round"] - 1, now=escape(self.todo[0]))
            case "client":
                self.todo.remove(event["client"])
                self.losses += [event["loss"]] if event.get("loss") is not None else []
                at_work = escape((self.todo or [event["client"]])[0])
                rate = event.get("tokens", 0) / max(event["seconds"], 1e-9)
                self.progress.update(self.bar, now=f"{at_work}  loss {_mean(self.losses):.3f}  {rate:,.0f} tokens/s")
            case "evaluated":
                self.progress.update(self.bar, now=f"evaluating {escape(event['client'])}")
            case "checkpoint":
                left = self.lines.left(event["round"])
                text = f"{clock(left)} left" if left else ""
                self.progress.update(self.bar, completed=event["round"], left=text)


def show_summary(console: Console, summary: dict[str, Json], folder: Path) -> None:
    """The table of a finished run: a row per client, the mean, what it cost, where the report is."""
    names = sorted({name for row in summary["clients"].values() for name in row["test"]})
    heading(console, f"{summary['title']}: test at round {summary['best_round']}")
    table = Table(box=None, header_style="bold")
    clusters = summary["describe"].get("clusters", {})
    for column in ("client", *(["cluster"] if clusters else []), "train rows", *names):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client, row in summary["clients"].items():
        cluster = [str(clusters.get(client, "-"))] if clusters else []
        table.add_row(escape(client), *cluster, str(row["num_train"]), *(_cell(row["test"].get(n)) for n in names))
    mean = summary["mean"].get("test", {})
    table.add_section()
    table.add_row("mean", *([""] if clusters else []), "", *(_cell(mean.get(n)) for n in names), style="bold")
    console.print(table)
    up, down = (size(summary["bytes"][way]) for way in ("up", "down"))
    console.print(
        f"{summary['rounds']} rounds in {clock(summary['seconds'])}, {up} up, {down} down, "
        f"peak memory {size(summary['peak_memory_bytes'])}",
        highlight=False,
    )
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _mean_loss(event: dict[str, Json]) -> float:
    return _mean([entry["loss"] for entry in event["clients"].values() if entry.get("loss") is not None])


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else float("nan")


def _means(mean: dict[str, Any]) -> str:
    return "  ".join(
        f"{split}: " + " ".join(f"{name} {_cell(value)}" for name, value in sorted(metrics.items()))
        for split, metrics in sorted(mean.items())
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
