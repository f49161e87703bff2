"""The privacy ledger of a run: every noisy release, and what all of them cost together.

It is written before anything that it counts leaves the server, and again with every checkpoint. A run that continues
takes the union of both: what a killed round released is counted, and what is released again with the same values and
the same noise is counted once, because it has the same name.
"""

from __future__ import annotations

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
    """A release: its round, its kind (updates, embeddings), how it was hidden, and a name that no other release has."""

    round: int
    kind: str
    noised: Noised
    name: str


@dataclass(frozen=True)
class Ledger:
    """The releases so far, in order."""

    entries: tuple[Entry, ...] = ()

    def with_entries(self, entries: Iterable[Entry]) -> Ledger:
        """This ledger and ``entries``; one that it has already counts once."""
        return Ledger(tuple(dict.fromkeys([*self.entries, *entries])))

    def spent(self, delta: float, more: Iterable[Entry] = ()) -> Spent:
        """What all releases cost, and ``more`` beside them.

        Those of one round saw the same cohort, so sampling hides it once: they count as one with less noise.
        """
        rounds: dict[int, list[Noised]] = {}
        for entry in self.with_entries(more).entries:
            rounds.setdefault(entry.round, []).append(entry.noised)
        return spent([noised for of in rounds.values() for noised in of_one_draw(of)], delta)

    def to_json(self) -> list[Mapping[str, object]]:
        return [asdict(entry) for entry in self.entries]


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
