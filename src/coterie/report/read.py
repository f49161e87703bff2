"""Reads a run folder and computes what a report shows, also for a run that has not finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from coterie.files import read_json
from coterie.methods import findings
from coterie.methods.findings import Clusters, Finding, find
from coterie.ops.metrics import Metrics
from coterie.report.plots import natural
from coterie.requests import Usage
from coterie.runs.events import METRICS, Evaluated, Note, RoundDone, Scores, StartState, read_events
from coterie.runs.summary import SUMMARY, ClientSummary, Summary, Traffic, joules_of, read_summary
from coterie.types import ClientId, CoterieError

SITES = "sites.json"  # the totals of a real federation
_SPLITS = ("test", "validation")
F = TypeVar("F", bound=Finding)


@dataclass(frozen=True)
class Client:
    """What a report shows of a client: ``cluster`` where the method found one, ``rows`` where they are known."""

    of: ClientSummary
    group: str | None = None
    cluster: int | None = None
    rows: tuple[int, int, int] | None = None  # for training, validation and test

    @property
    def scores(self) -> Scores:
        return {"test": self.of.test, "validation": self.of.validation}


@dataclass(frozen=True)
class Run:
    """The content of a run folder, read once. If a round was logged twice, after a resume, the last counts."""

    name: str
    summary: Summary | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    manifest: Mapping[str, object] = field(default_factory=dict)
    sites: Mapping[str, object] = field(default_factory=dict)
    start: StartState | None = None
    rounds: Mapping[int, RoundDone] = field(default_factory=dict)
    evaluations: Mapping[int, Evaluated] = field(default_factory=dict)
    notes: Sequence[Note] = ()

    @property
    def title(self) -> str:
        method = self.config.get("method")
        named = method.get("name") if isinstance(method, dict) else None
        return str((self.summary and self.summary.title) or named or self.name)

    @property
    def primary(self) -> str:
        """The metric that chose the best round: the summary's, else accuracy if it was measured, else the loss."""
        if self.summary:
            return self.summary.primary
        measured = [metrics for event in self.evaluations.values() for metrics in event.mean.values()]
        return "accuracy" if any("accuracy" in metrics for metrics in measured) else "loss"

    @property
    def best(self) -> int | None:
        """The round that the results are of, where that is known."""
        return self.summary.best_round if self.summary else None

    @property
    def exported(self) -> int | None:
        """The round of the experts and bundles, where that is known."""
        return self.summary.exported_round if self.summary else None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the method found, after the last round that was logged."""
        described = [*self._described().values(), self.summary.describe if self.summary else {}]
        return findings.from_json({name: value for part in described for name, value in part.items()})

    def history(self, kind: type[F]) -> dict[int, F]:
        """The finding of a ``kind`` after each round, from the first that has one; 0 is before the first round."""
        described: dict[str, object] = {}
        after: dict[int, F] = {}
        now: F | None = None
        for rnd, describe in self._described().items():
            if describe:
                described |= describe
                now = findings.read(kind, described)
            if now is not None:
                after[rnd] = now
        return after

    def _described(self) -> dict[int, Mapping[str, object]]:
        """What every round added to the description of the method's state; 0 is before the first."""
        start = {0: self.start.describe} if self.start else {}
        return start | {rnd: event.describe for rnd, event in sorted(self.rounds.items())}

    @property
    def last(self) -> Evaluated | None:
        """The last evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def usage(self) -> Mapping[ClientId, Usage]:
        """How each client's tokens use its experts: the summary's, else that of the last evaluation."""
        known_by = [self.summary.usage if self.summary else {}, (self.last.usage if self.last else None) or {}]
        return next((known for usage in known_by if (known := {c: of for c, of in usage.items() if of})), {})

    @property
    def mean(self) -> Scores:
        """Mean metrics by split: at the best round, or at the last evaluated one of a run that has not finished."""
        return (self.summary.mean if self.summary else None) or (self.last.mean if self.last else {})

    @cached_property
    def clients(self) -> dict[ClientId, Client]:
        """Every client, by group, in natural order."""
        rows = dict(self.summary.clients) if self.summary and self.summary.clients else self._added_up()
        clusters = find(self.findings, Clusters)
        members = clusters.members if clusters else {}
        made = {
            client: Client(of, self.group_of.get(client), members.get(client), _rows(of) if self.summary else None)
            for client, of in rows.items()
        }
        return dict(sorted(made.items(), key=lambda item: (natural(item[1].group or ""), natural(item[0]))))

    def _added_up(self) -> dict[ClientId, ClientSummary]:
        """What the events say of the clients, for a run without a summary."""
        scores: Mapping[ClientId, Scores] = self.last.clients if self.last else {}
        events = self.rounds.values()
        made = {}
        for client in scores.keys() | {client for event in events for client in [*event.clients, *event.failed]}:
            entries = [event.clients[client] for event in events if client in event.clients]
            made[client] = ClientSummary(
                test=scores.get(client, {}).get("test", {}),
                validation=scores.get(client, {}).get("validation", {}),
                bytes_up=sum(entry.bytes_up for entry in entries),
                bytes_down=sum(entry.bytes_down for entry in entries),
                seconds=sum(entry.seconds for entry in entries),
                rounds_missed=sum(client in event.failed for event in events),
                gflop=math.fsum(entry.gflop for entry in entries),
                gflop_active=math.fsum(entry.gflop_active for entry in entries),
                **joules_of(entries),
            )
        return made

    @cached_property
    def group_of(self) -> dict[ClientId, str | None]:
        """The group of every client that the manifest or the summary names."""
        listed = self.manifest.get("clients")
        rows = {c: of for c, of in listed.items() if isinstance(of, dict)} if isinstance(listed, dict) else {}
        known = {client: of.get("group") for client, of in rows.items()}
        return known | ({client: of.group for client, of in self.summary.clients.items()} if self.summary else {})

    @property
    def splits(self) -> list[str]:
        return [split for split in _SPLITS if self.mean.get(split)]

    @property
    def metrics(self) -> list[str]:
        """What was measured, the primary metric first."""
        names = {name: None for split in self.splits for name in self.mean[split]}
        return sorted(names, key=lambda name: name != self.primary)

    @property
    def groups(self) -> dict[str, tuple[int, float]]:
        """The number of clients and their mean of the primary metric, on test data, by group."""
        by_group: dict[str, list[float]] = {}
        for client in self.clients.values():
            if client.group is not None and (value := client.of.test.get(self.primary)) is not None:
                by_group.setdefault(client.group, []).append(value)
        return {group: (len(values), sum(values) / len(values)) for group, values in by_group.items()}

    @property
    def percentiles(self) -> Metrics:
        return self.summary.percentiles if self.summary else {}

    @property
    def failures(self) -> list[tuple[int, ClientId, str]]:
        """(round, client, reason) of every reply that did not count."""
        return [(rnd, c, why) for rnd, event in sorted(self.rounds.items()) for c, why in event.failed.items()]

    @property
    def losses(self) -> dict[int, float]:
        """The mean training loss of each round in which a client reported one."""
        return {rnd: event.loss for rnd, event in sorted(self.rounds.items()) if event.loss is not None}

    @property
    def bytes(self) -> Traffic:
        if self.summary and self.summary.bytes != Traffic():
            return self.summary.bytes
        rows = [client.of for client in self.clients.values()]
        return Traffic(sum(row.bytes_up for row in rows), sum(row.bytes_down for row in rows))

    @property
    def seconds(self) -> float:
        if self.summary and self.summary.seconds:
            return self.summary.seconds
        return sum(of.seconds for of in self.rounds.values()) + sum(of.seconds for of in self.evaluations.values())

    def curve(self, split: str, client: ClientId | None = None) -> list[tuple[int, float]]:
        """The primary metric by round: of one client, or the mean."""
        points = []
        for rnd, event in sorted(self.evaluations.items()):
            scores = event.mean if client is None else event.clients.get(client, {})
            if (value := scores.get(split, {}).get(self.primary)) is not None:
                points.append((rnd, value))
        return points


def read_run(folder: Path, summary: Summary | None = None) -> Run:
    """What ``folder`` holds; ``summary`` stands for ``summary.json`` where that is not written yet.

    A last line of the metrics that is incomplete (the run was killed) is left out and noted. Raises
    :class:`CoterieError` for a folder that holds no run and for a file in it that is damaged.
    """
    config, manifest, sites = (_mapping(folder / f"{name}.json") for name in ("config", "manifest", "sites"))
    if summary is None and (folder / SUMMARY).is_file():
        summary = read_summary(folder / SUMMARY)
    notes: list[Note] = []
    events = read_events(folder / METRICS, lambda text: notes.append(Note(text)))
    if not (config or manifest or summary or events):
        raise CoterieError(f"{folder} holds no run: no {SUMMARY}, {METRICS} or config.json; give a run's folder")
    return Run(
        folder.resolve().name,
        summary,
        inner if isinstance(inner := config.get("config"), dict) else config,  # beside it: where its paths start
        manifest,
        sites,
        next((event for event in events if isinstance(event, StartState)), None),
        {event.round: event for event in events if isinstance(event, RoundDone)},
        {event.round: event for event in events if isinstance(event, Evaluated)},
        [*notes, *(event for event in events if isinstance(event, Note))],
    )


def _mapping(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise CoterieError(f"{path} holds a {type(content).__name__} instead of an object; is this a run's folder?")
    return content


def _rows(of: ClientSummary) -> tuple[int, int, int]:
    return of.num_train, of.num_validation, of.num_test
