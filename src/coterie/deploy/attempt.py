"""One start of a run's server: what ``coterie serve`` leaves for it in the run's folder."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from coterie.files import read_json_as, write_json
from coterie.types import ClientId

_FILE = "attempt.json"
_EARLIER_FILE = "deal.json"  # what versions before 0.1.0 called it


@dataclass(frozen=True)
class Attempt:
    """``number`` counts the starts; the sites keep the run's personal state under the id ``run``.

    ``keys`` is the site that owns a key, by the key's SHA-256. ``onboard``: the sites that join the run after its end.
    ``starts``: the attempts that went back to a round, each with that round (attempts of older versions are not in it).
    """

    run: str
    number: int
    keys: Mapping[str, ClientId]
    onboard: Sequence[ClientId] = ()
    starts: tuple[tuple[int, int], ...] = ()

    @property
    def earlier(self) -> tuple[tuple[int, int], ...]:
        """``starts`` without this attempt's own."""
        return tuple(start for start in self.starts if start[0] < self.number)


def read_attempt(folder: Path) -> Attempt:
    """The newest attempt of the run in ``folder``."""
    saved = read_json_as(folder / _FILE, _SAVED)
    return Attempt(saved.run, saved.attempt, saved.keys, saved.onboard, saved.starts)


def begin_attempt(folder: Path, keys: Mapping[str, ClientId], onboard: Sequence[ClientId] = ()) -> Attempt:
    """Record that the run in ``folder`` is started once more."""
    if (folder / _EARLIER_FILE).exists():
        (folder / _EARLIER_FILE).rename(folder / _FILE)
    old = read_attempt(folder) if (folder / _FILE).exists() else None
    run = old.run if old else f"{folder.name[:60]}-{secrets.token_hex(8)}"
    attempt = Attempt(run, old.number + 1 if old else 1, dict(keys), onboard, old.starts if old else ())
    _write(folder, attempt)
    return attempt


def record_start(folder: Path, rnd: int) -> None:
    """Record that the newest attempt starts from round ``rnd``: what sites did after it is undone."""
    attempt = read_attempt(folder)
    _write(folder, replace(attempt, starts=(*attempt.earlier, (attempt.number, rnd))))


def _write(folder: Path, attempt: Attempt) -> None:
    saved = {"run": attempt.run, "attempt": attempt.number, "keys": dict(attempt.keys), "starts": attempt.starts}
    write_json(folder / _FILE, saved | ({"onboard": list(attempt.onboard)} if attempt.onboard else {}))


@dataclass(frozen=True)
class _Saved:
    run: str
    attempt: int
    keys: dict[str, ClientId]
    onboard: tuple[ClientId, ...] = ()
    starts: tuple[tuple[int, int], ...] = ()


_SAVED = TypeAdapter(_Saved)
