"""The summary of a run: metrics at the round that validation chose, per client and over clients, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from coterie import __version__
from coterie.data.truncation import Truncation
from coterie.files import read_json
from coterie.machine import facts, peak_memory, versions
from coterie.methods import findings
from coterie.methods.findings import Finding
from coterie.ops.metrics import Metrics, better, mean_metrics, percentiles, worst_client
from coterie.requests import ExpertUse, Usage
from coterie.runs.entries import ClientRound, plain
from coterie.runs.events import Evaluated, Event, RoundDone, Scores, StartState, Truncated
from coterie.runs.guarantee import Guarantee
from coterie.types import ClientId, ClientInfo, CoterieError, Number

SUMMARY = "summary.json"
PRIMARY = {"classification": "accuracy", "generation": "loss", "multiple_choice": "accuracy"}
ALL_MODULES = ""  # stands for the mean over modules, where all modules have the same experts


@dataclass(frozen=True)
class ClientSummary:
    """A client's rows, its metrics at the best round, and what it cost: bytes as encoded, seconds, and billions of
    floating-point operations of training, as its replies report them (``gflop_active``: those that the experts in use
    need). ``joules`` is None where the energy is not known; ``joules_from`` says where it comes from."""

    group: str | None = None
    labels: Sequence[str] | None = None
    num_train: int = 0
    num_validation: int = 0
    num_test: int = 0
    test: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    rounds_missed: int = 0
    gflop: float = 0.0
    gflop_active: float = 0.0
    joules: float | None = None
    joules_from: str = ""


@dataclass(frozen=True)
class Worst:
    """The client with the worst test ``metric``."""

    client: ClientId
    metric: str
    value: Number

    def to_json(self) -> dict[str, object]:
        return {"client": self.client, self.metric: plain(self.value)}


class JoulesOf(TypedDict):
    """The fields of a summary that say what energy was used."""

    joules: float | None
    joules_from: str


@dataclass(frozen=True)
class Traffic:
    """Bytes as encoded, of all clients: to the server and from it."""

    up: int = 0
    down: int = 0


def _fields_of_worst(line: object) -> object:
    if not isinstance(line, Mapping):
        return line
    metrics = [name for name in line if name != "client"]
    return {"client": line.get("client"), "metric": metrics[0], "value": line[metrics[0]]} if metrics else None


def _fields_of_usage(usage: object) -> object:
    def whole(row: object) -> bool:
        return isinstance(row, Mapping) and "weight" in row

    if not isinstance(usage, Mapping):
        return usage
    return {client: {ALL_MODULES: row} if whole(row) else row for client, row in usage.items()}


@dataclass(frozen=True)
class Summary:
    """The results of a run, as in ``summary.json``. Seconds leave out work that a crash undid.

    ``evaluated`` says which model was measured: the one that a client receives, or the one that it trained last.
    ``best_round`` is the round of the metrics, ``exported_round`` that of the experts and the clients' bundles.
    ``describe`` has the findings by their names in JSON, :attr:`findings` has them as types. ``usage`` is each
    client's use of its experts in the last round, by module or under :data:`ALL_MODULES`. ``privacy``: what
    ``[privacy]`` guarantees; None without it.
    """

    coterie: str = ""
    method: str = ""
    title: str = ""
    task: str = ""
    evaluated: str = "received"
    seed: int | None = None
    rounds: int = 0
    best_round: int | None = None
    exported_round: int | None = None
    primary: str = "loss"
    clients: Mapping[ClientId, ClientSummary] = field(default_factory=dict)
    mean: Scores = field(default_factory=dict)
    worst: Annotated[Worst | None, BeforeValidator(_fields_of_worst)] = None
    percentiles: Metrics = field(default_factory=dict)
    truncated: Truncation | None = None
    bytes: Traffic = Traffic()
    seconds: float = 0.0
    gflop: float = 0.0
    gflop_active: float = 0.0
    joules: float | None = None
    joules_from: str = ""
    peak_memory_bytes: int = 0
    describe: Mapping[str, object] = field(default_factory=dict)
    usage: Annotated[Mapping[ClientId, Usage], BeforeValidator(_fields_of_usage)] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, object] | None = None
    privacy: Guarantee | None = None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the method found, at the end of the run."""
        return findings.from_json(self.describe)

    def to_json(self) -> dict[str, object]:
        """``summary.json``: null for a number that is infinite or not a number."""
        line = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "usage"}
        line["usage"] = {client: plain(_mean_of(usage) or usage) for client, usage in self.usage.items()}
        line["worst"] = line["worst"] or {}
        return {f.name: line[f.name] for f in fields(self)}


def _mean_of(usage: Usage) -> dict[str, object] | None:
    whole = usage.get(ALL_MODULES)
    return {"weight": whole.weight, "share": whole.share} if whole else None


def read_summary(path: Path) -> Summary:
    """The summary in ``path``. Raises :class:`CoterieError` for a file that is damaged or not a summary."""
    content = read_json(path)
    try:
        return _SUMMARY.validate_python(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CoterieError(f"{path} is not a summary: {where}: {first['msg']}; is this a run's folder?") from fault


def best_round(evaluations: Sequence[Evaluated], metric: str) -> int:
    """The round with the best mean validation metric, the earliest on a tie; the last one without validation data.

    Test data plays no part in the choice.
    """
    best: tuple[int, float] | None = None
    for event in evaluations:
        value = event.mean.get("validation", {}).get(metric)
        if value is None or np.isnan(value):
            continue
        value = round(value, 9)  # means of the same values differ in their last bits
        if best is None or better(metric, value, best[1]):
            best = event.round, value
    return best[0] if best else evaluations[-1].round


def summarise(
    events: Sequence[Event],
    clients: Sequence[ClientInfo],
    *,
    method: str,
    title: str,
    task: str,
    seed: int,
    evaluated: str = "received",
    exported_round: int | None = None,
) -> Summary:
    """The summary of a run that had these ``events``."""
    rounds = [event for event in events if isinstance(event, RoundDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    best = best_round(evaluations, PRIMARY[task])
    scores = next(event.clients for event in evaluations if event.round == best)
    lengths = [Truncation(event.rows, event.cut, event.tokens) for event in events if isinstance(event, Truncated)]
    described = [event for event in events if isinstance(event, StartState | RoundDone)]
    summary = Summary(
        coterie=__version__,
        method=method,
        title=title,
        task=task,
        evaluated=evaluated,
        seed=seed,
        rounds=len(rounds),
        best_round=best,
        exported_round=exported_round,
        primary=PRIMARY[task],
        clients={c.id: _client(c, scores.get(c.id, {}), rounds) for c in clients},
        truncated=lengths[-1] if lengths else None,
        seconds=sum(event.seconds for event in rounds) + sum(event.seconds for event in evaluations),
        peak_memory_bytes=max([*(event.peak_memory_bytes for event in rounds), peak_memory()]),
        describe={name: value for event in described for name, value in event.describe.items()},
        usage=_usage({client: of for client, of in (evaluations[-1].usage or {}).items() if of}),
        versions=versions(),
        machine=facts(),
    )
    return replace(_over_clients(summary, scores), **joules_of(e for event in rounds for e in event.clients.values()))


def _over_clients(summary: Summary, scores: Mapping[ClientId, Scores]) -> Summary:
    """``summary`` with its figures over all clients; ``scores`` are those of the best round."""
    rows, primary = summary.clients.values(), summary.primary
    splits = sorted({split for by_split in scores.values() for split in by_split})
    tests = {client: row.test for client, row in summary.clients.items() if row.test}
    worst = worst_client(primary, tests)
    return replace(
        summary,
        mean={split: mean_metrics({c: s[split] for c, s in scores.items() if split in s}) for split in splits},
        worst=Worst(worst[0], primary, worst[1]) if worst else None,
        percentiles=percentiles(primary, tests),
        bytes=Traffic(sum(row.bytes_up for row in rows), sum(row.bytes_down for row in rows)),
        gflop=math.fsum(row.gflop for row in rows),
        gflop_active=math.fsum(row.gflop_active for row in rows),
    )


def _client(client: ClientInfo, scores: Scores, rounds: Sequence[RoundDone]) -> ClientSummary:
    entries = [event.clients[client.id] for event in rounds if client.id in event.clients]
    return ClientSummary(
        group=client.group,
        labels=list(client.labels) if client.labels else None,
        num_train=client.num_train,
        num_validation=client.num_validation,
        num_test=client.num_test,
        test=scores.get("test", {}),
        validation=scores.get("validation", {}),
        bytes_up=sum(entry.bytes_up for entry in entries),
        bytes_down=sum(entry.bytes_down for entry in entries),
        seconds=sum(entry.seconds for entry in entries),
        rounds_missed=sum(client.id in event.failed for event in rounds),
        gflop=math.fsum(entry.gflop for entry in entries),
        gflop_active=math.fsum(entry.gflop_active for entry in entries),
        **joules_of(entries),
    )


def joules_of(entries: Iterable[ClientRound]) -> JoulesOf:
    """The joules of all ``entries`` that say them, and where these come from; "incomplete" where some do not."""
    energies = [entry.energy for entry in entries if entry.said or entry.energy]
    known = [energy for energy in energies if energy]
    if not known:
        return {"joules": None, "joules_from": ""}
    sources = sorted({energy.source for energy in known}) + ["incomplete"] * (len(known) < len(energies))
    return {"joules": math.fsum(energy.joules for energy in known), "joules_from": ", ".join(sources)}


def _usage(usage: Mapping[ClientId, Usage]) -> Mapping[ClientId, Usage]:
    """The mean over modules; by module where their experts differ, so that a mean would be meaningless."""
    rows = [row for of in usage.values() for row in of.values()]
    numbered = all(list(row.expert) in ([], list(range(len(row.weight)))) for row in rows)
    if not numbered or len({len(row.weight) for row in rows}) > 1:
        return usage
    return {client: {ALL_MODULES: mean_use(of)} for client, of in usage.items()}


def mean_use(usage: Usage) -> ExpertUse:
    """The mean over modules that all have the same experts."""
    rows = list(usage.values())
    weight, share = (np.mean([getattr(row, what) for row in rows], axis=0).tolist() for what in ("weight", "share"))
    return ExpertUse(weight, share)


_SUMMARY = TypeAdapter(Summary)
