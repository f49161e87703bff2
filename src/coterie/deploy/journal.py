"""``federation.jsonl``, the journal of a federation: a line of JSON per event, never truncated.

The server writes it and ``coterie serve`` shows it; ``coterie status``, the metrics and the report add it up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coterie.deploy.events import FEDERATION
from coterie.runs.events import Event, from_json
from coterie.text import parse_json
from coterie.types import CoterieError

JOURNAL = "federation.jsonl"


@dataclass(frozen=True)
class Journal:
    """Appends events with their time."""

    path: Path

    def __call__(self, event: Event) -> None:
        at = {"at": round(time.time(), 3)}
        line = json.dumps({**at, **event.to_json(), **at}, allow_nan=False)  # first, whatever a reply calls "at"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Entry(NamedTuple):
    """An event of a journal, and when it happened: seconds since 1970."""

    at: float
    event: Event


def read_journal(folder: Path) -> list[Entry]:
    """All events so far, except for a line that is still being written."""
    return list(Reader(folder / JOURNAL).new())


@dataclass
class Reader:
    """Reads events as they are written."""

    path: Path
    at: int = 0

    def new(self) -> Iterator[Entry]:
        """The events since the last call, without those of kinds that this version does not know.

        Raises :class:`CoterieError` for a line that is damaged.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.at += len(line)
                try:
                    record = parse_json(line)
                    event = from_json(record, FEDERATION)
                    at = float(record.get("at", "missing"))
                except (ValueError, TypeError) as fault:
                    raise CoterieError(
                        f"{self.path} is damaged in the line that ends at byte {self.at} ({fault}); remove that line"
                    ) from fault
                if event is not None:
                    yield Entry(at, event)
