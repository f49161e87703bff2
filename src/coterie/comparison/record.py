"""``compare.json``: the figures of a comparison, and of the demo; docs/comparing.md explains them.

Metrics are the primary metric of the task, on test data unless a name says otherwise; None where it is not known. Every
mean over clients or seeds is unweighted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie.comparison.jobs import Missing
from coterie.comparison.tuning import Choice
from coterie.files import read_json, write_json
from coterie.ops.statistics import Interval
from coterie.runs.entries import plain
from coterie.types import ClientId

RECORD = "compare.json"
FORMAT = 1


@dataclass(frozen=True)
class Reached:
    """The first evaluated round whose mean reaches the target, and the bytes that all clients sent and received."""

    round: int
    bytes: int


@dataclass(frozen=True)
class RunFigures:
    """One run: a variant with a seed. ``folder`` is below that of the comparison; ``seconds`` as in its summary.

    ``p10`` is the 10th percentile over the clients (of a loss, the 90th): nine in ten clients are better. ``beyond`` is
    the mean of the clients' models on other clients' rows with the same labels, ``home`` that on their own, both of
    the exported round (:mod:`.cross`). ``newcomers`` is the mean of the clients that joined afterwards
    (:mod:`.newcomers`). ``gflop``: billions of floating-point operations of training, over all clients.
    """

    seed: int
    folder: str
    rounds: int
    best_round: int | None
    mean: float | None
    validation: float | None
    worst: float | None
    worst_client: ClientId | None
    p10: float | None
    clients: Mapping[ClientId, float | None]
    bytes_up: int
    bytes_down: int
    seconds: float
    target: Reached | None = None
    home: float | None = None
    beyond: float | None = None
    newcomers: float | None = None
    gflop: float | None = None


@dataclass(frozen=True)
class Against:
    """A variant against the best other one, paired by seed and client: ``difference`` is this one less the other.

    ``interval`` is a bootstrap over clients, ``p`` that of a permutation test, ``p_holm`` adjusted for all variants;
    ``wins``, ``losses`` and ``ties`` count clients by their mean over the seeds.
    """

    variant: str
    seeds: Sequence[int]
    difference: float
    interval: Interval
    p: float
    p_holm: float
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Figures:
    """A variant over its seeds. ``std`` and ``interval`` are over seeds, ``client_interval`` over clients.

    ``bytes``, ``seconds``, ``gflop``, ``target_round`` and ``target_bytes`` are means over the seeds; the last two are
    None where a seed did not reach the target.
    """

    title: str
    method: str
    evaluated: str
    seeds: Sequence[int]
    mean: float | None
    std: float
    interval: Interval | None
    client_interval: Interval | None
    validation: float | None
    worst: float | None
    p10: float | None
    bytes: float
    seconds: float
    target_round: float | None
    target_bytes: float | None
    clients: Mapping[ClientId, float | None]
    groups: Mapping[ClientId, str | None]
    runs: Sequence[RunFigures]
    home: float | None = None
    beyond: float | None = None
    newcomers: float | None = None
    gflop: float | None = None
    tuned: Choice | None = None
    against: Against | None = None


@dataclass(frozen=True)
class Record:
    """A whole comparison. ``best`` has the best validation mean, references such as centralised aside, and is None
    where there are no validation data: test data choose nothing. ``target`` is derived from it unless it was given.

    ``versions`` and ``machine`` are those of the last run that finished, ``commit`` is that of Coterie's checkout.
    """

    primary: str
    variants: Mapping[str, Figures]
    format: int = FORMAT
    best: str | None = None
    target: float | None = None
    missing: Sequence[Missing] = ()
    clusters: Mapping[str, Mapping[ClientId, int]] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, object] | None = None
    commit: str | None = None


_RECORD = TypeAdapter(Record)


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` as JSON."""
    write_json(path, plain(record))


def read_record(path: Path) -> Record | None:
    """The record in ``path``; None where there is none, or one of another format."""
    if not path.is_file():
        return None
    content = read_json(path, "remove it; the finished runs beside it are kept")
    try:
        record = _RECORD.validate_python(content)
    except ValidationError:  # that of an older version
        return None
    return record if record.format == FORMAT else None
