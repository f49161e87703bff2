"""``federation.jsonl``: what happens in a federation, as it happens: a line of JSON per event, never truncated.

The server writes it and ``coterie serve`` shows it; ``coterie status``, the metrics and the report add it up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.runs.events import Event, plain
from coterie.types import Json

JOURNAL = "federation.jsonl"


@dataclass(frozen=True)
class Journal:
    """Appends events with their time."""

    path: Path

    def __call__(self, event: Event | Mapping[str, Json]) -> None:
        at = {"at": round(time.time(), 3)}
        line = json.dumps({**at, **plain(event), **at}, allow_nan=False)  # comes first, and is never the event's own
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_journal(folder: Path) -> list[dict[str, Json]]:
    """All events so far, except for a line that is still being written."""
    return list(Reader(folder / JOURNAL).new())


@dataclass
class Reader:
    """Reads events as they are written."""

    path: Path
    at: int = 0

    def new(self) -> Iterator[dict[str, Json]]:
        """The events since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.at += len(line)
                yield json.loads(line)
