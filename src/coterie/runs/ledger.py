"""The privacy ledger of a run: every noisy release, and what all of them cost together.

It is written before anything that it counts leaves the server, and again with every checkpoint. A run that continues
takes the union of both: what a killed round released is counted, and what is released again with the same values and
the same noise is counted once, because it has the same name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie.files import read_json, write_json
from coterie.ops.accounting import Noised, Spent, of_one_draw, spent
from coterie.types import CoterieError

LEDGER = "privacy.json"


@dataclass(frozen=True)
class Entry:
    """A release: its round, its kind (updates, embeddings), how it was hidden, and a name that no other release has.

    ``rows``: it concerns only the rows of clients that have so many, and is ``times`` steps of their training, each
    with rows drawn anew, or what they measure; 0: it concerns every client.
    """

    round: int
    kind: str
    noised: Noised
    name: str
    rows: int = 0
    times: int = 1


@dataclass(frozen=True)
class Ledger:
    """The releases so far, in order."""

    entries: tuple[Entry, ...] = ()

    def with_entries(self, entries: Iterable[Entry]) -> Ledger:
        """This ledger and ``entries``; one that it has already counts once."""
        return Ledger(tuple(dict.fromkeys([*self.entries, *entries])))

    def spent(self, delta: float, more: Iterable[Entry] = ()) -> Spent:
        """What all releases cost, and ``more`` beside them.

        Those of one round saw the same cohort, so sampling hides it once: they count as one with less noise. Steps of
        training cost the rows of whoever they cost most.
        """
        entries = self.with_entries(more).entries
        each = {entry.rows for entry in entries if entry.rows} or {0}
        return max((_spent(entries, rows, delta) for rows in sorted(each)), key=lambda of: of.epsilon)

    def of_rows(self) -> dict[str, int]:
        """By kind, the most releases that any client's rows are counted in: steps of training, what it measures."""
        each: Counter[tuple[str, int]] = Counter()
        for entry in self.entries:
            each[entry.kind, entry.rows] += entry.times if entry.rows else 0
        kinds = sorted({kind for kind, _ in each})
        return {kind: max(number for (of, _), number in each.items() if of == kind) for kind in kinds}

    def to_json(self) -> list[Mapping[str, object]]:
        of_rows = ("rows", "times")
        return [{k: v for k, v in asdict(e).items() if e.rows or k not in of_rows} for e in self.entries]


def _spent(entries: Iterable[Entry], rows: int, delta: float) -> Spent:
    """What those of ``entries`` cost that concern a client of so many ``rows``."""
    rounds: dict[int, list[Noised]] = {}
    steps: list[Noised] = []
    for entry in entries:
        if entry.rows:
            steps += [entry.noised] * (entry.times if entry.rows == rows else 0)
        else:
            rounds.setdefault(entry.round, []).append(entry.noised)
    return spent([*steps, *(noised for of in rounds.values() for noised in of_one_draw(of))], delta)


def ledger_from(lines: object, where: str) -> Ledger:
    """The ledger that :meth:`Ledger.to_json` wrote. Raises :class:`CoterieError` for anything else."""
    try:
        return Ledger(_ENTRIES.validate_python(lines))
    except ValidationError as fault:
        raise CoterieError(
            f"{where} is not a privacy ledger ({fault.errors()[0]['msg']}); restore it: without it nobody knows what "
            "the run has spent"
        ) from fault


def read_ledger(folder: Path) -> Ledger:
    """The ledger in a run's ``folder``; empty where there is none."""
    path = folder / LEDGER
    return ledger_from(read_json(path, "restore it")["entries"], str(path)) if path.exists() else Ledger()


def write_ledger(folder: Path, ledger: Ledger, spent_so_far: Spent) -> None:
    """Write the ledger to a run's ``folder``; it is on the disk once this returns."""
    write_json(folder / LEDGER, {"spent": asdict(spent_so_far), "entries": ledger.to_json()})


_ENTRIES = TypeAdapter(tuple[Entry, ...])
