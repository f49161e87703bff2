"""What happens in a run, as types; each is also a line of JSON, in ``metrics.jsonl`` and in a federation's journal.

A listener is called with every event as it happens. ``metrics.jsonl`` keeps those that a report needs:
:class:`StartState`, :class:`Truncated`, :class:`RoundDone`, :class:`Evaluated` and :class:`Note`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import TypeAdapter, ValidationError

from coterie.methods.robust import Weighed
from coterie.methods.secure import Sum
from coterie.ops.accounting import Spent
from coterie.ops.metrics import Metrics
from coterie.requests import Sample, Usage
from coterie.runs.entries import EntryLine, plain
from coterie.text import parse_json
from coterie.types import ClientId, CoterieError

METRICS = "metrics.jsonl"
Scores = Mapping[str, Metrics]  # by split


@dataclass(frozen=True)
class Event:
    """Something that happened. ``event`` names its kind in JSON."""

    event: ClassVar[str]

    def to_json(self) -> dict[str, object]:
        """A line of JSON. An optional field that is None is left out."""
        line: dict[str, object] = {"event": self.event}
        for of in fields(self):
            value = getattr(self, of.name)
            if value is not None or of.default is not None:
                line[of.name] = plain(value)
        return line

    @classmethod
    def fields_in(cls, line: Mapping[str, object]) -> Mapping[str, object]:
        """The fields of a line that :meth:`to_json` wrote."""
        return line


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Ready(Event):
    """The data and the base are loaded, and the rounds begin."""

    event = "ready"

    clients: int
    rounds: int
    folder: str = ""


@dataclass(frozen=True)
class Resumed(Event):
    """The run continues after ``round``."""

    event = "resumed"

    round: int


@dataclass(frozen=True)
class Note(Event):
    """Something that the user should know, in words."""

    event = "note"

    text: str
    round: int | None = None


@dataclass(frozen=True)
class StartState(Event):
    """What the method found before the first round: see :mod:`coterie.methods.findings`."""

    event = "start_state"

    round: int = 0
    describe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Truncated(Event):
    """Of ``rows`` rows, ``cut`` are longer than ``[model] max_length`` and lose ``tokens`` tokens together."""

    event = "truncated"

    rows: int = 0
    cut: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class RoundStart(Event):
    """A round begins with these clients."""

    event = "start"

    round: int
    clients: Sequence[ClientId]


@dataclass(frozen=True)
class ClientSteps(Event):
    """Clients that train together have taken ``taken`` of their ``of`` optimiser steps. Kept nowhere."""

    event = "steps"

    round: int
    clients: Sequence[ClientId]
    taken: int
    of: int


@dataclass(frozen=True)
class ClientDone(Event):
    """A client's reply came, or failed for the reason in ``failed``."""

    event = "client"

    round: int
    client: ClientId
    entry: EntryLine
    failed: str | None

    def to_json(self) -> dict[str, object]:
        mine = {"event": self.event, "round": self.round, "client": self.client, "failed": self.failed}
        return {**self.entry.to_json(), **mine}

    @classmethod
    def fields_in(cls, line: Mapping[str, object]) -> Mapping[str, object]:
        own = {of.name for of in fields(cls)} | {"event"}
        return {**line, "entry": {name: value for name, value in line.items() if name not in own}}


@dataclass(frozen=True)
class RoundDone(Event):
    """A round is averaged: every client's part, why some replies were not used, and what changed in the findings.

    ``robust``: what the rule of ``[robust]`` made of every update; None without a rule. ``sums``: what became of every
    group's secure sum; None where clients' updates are in the clear. ``privacy``: what the run has spent so far; None
    without ``[privacy]``.
    """

    event = "round"

    round: int
    clients: Mapping[ClientId, EntryLine] = field(default_factory=dict)
    failed: Mapping[ClientId, str] = field(default_factory=dict)
    seconds: float = 0.0
    describe: Mapping[str, object] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    robust: Mapping[ClientId, Weighed] | None = None
    sums: Mapping[str, Sum] | None = None
    privacy: Spent | None = None

    @property
    def loss(self) -> float | None:
        """The mean of the clients' training losses; None where nobody reported one."""
        losses = [entry.loss for entry in self.clients.values() if entry.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def tokens(self) -> int:
        """The tokens that all clients trained on."""
        return sum(entry.tokens for entry in self.clients.values())


@dataclass(frozen=True)
class ClientEvaluated(Event):
    """One client was evaluated; ``of`` is the number of clients."""

    event = "evaluated"

    round: int
    client: ClientId
    of: int


@dataclass(frozen=True)
class Evaluated(Event):
    """The metrics after a round: of each client by split, and their mean.

    ``usage``, and ``samples`` of generated text, are known in the last round.
    """

    event = "evaluation"

    round: int
    clients: Mapping[ClientId, Scores] = field(default_factory=dict)
    mean: Scores = field(default_factory=dict)
    usage: Mapping[ClientId, Usage] | None = None
    seconds: float = 0.0
    samples: Mapping[ClientId, Sequence[Sample]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Everything of ``round`` is on the disk; 0 is the state before the first round."""

    event = "checkpoint"

    round: int


class Kind(NamedTuple):
    """A type of event, and what makes one from its fields."""

    type: type[Event]
    adapter: TypeAdapter[Event]


Kinds = Mapping[str, Kind]


def kinds(*types: type[Event]) -> Kinds:
    """``types`` by their name in JSON."""
    return {kind.event: Kind(kind, TypeAdapter(kind)) for kind in types}


RUN = kinds(
    Ready,
    Resumed,
    Note,
    StartState,
    Truncated,
    RoundStart,
    ClientSteps,
    ClientDone,
    RoundDone,
    ClientEvaluated,
    Evaluated,
    CheckpointSaved,
)


def from_json(line: object, known: Kinds = RUN) -> Event | None:
    """The event in a line of JSON, or None for a kind that is not ``known``.

    Raises :class:`ValueError` that says which field is wrong.
    """
    if not isinstance(line, Mapping):
        raise ValueError("it is not a JSON object")
    kind = known.get(str(line.get("event")))
    if kind is None:
        return None
    try:
        event = kind.adapter.validate_python(kind.type.fields_in(line))
    except ValidationError as fault:
        first = fault.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from fault
    return event


def read_events(metrics: Path, note: Callable[[str], None] = lambda text: None) -> list[Event]:
    """The events in a ``metrics.jsonl``, none where there is no file.

    A last line that is incomplete, because the run was killed, is left out with a ``note``. Raises
    :class:`CoterieError` for any other line that cannot be read.
    """
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as fault:
            if number == len(lines):
                note(f"The last line of {metrics.name} is incomplete and was left out.")
                break
            raise CoterieError(f"{metrics}, line {number} is not JSON: {fault}; repair or remove it") from fault
        try:
            event = from_json(record)
        except ValueError as fault:
            raise CoterieError(f"{metrics}, line {number} cannot be read: {fault}; repair or remove it") from fault
        if event is not None:
            events.append(event)
    return events
