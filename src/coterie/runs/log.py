"""What a run writes down as it goes: a line of ``metrics.jsonl`` for every event, which its listener hears too.

A checkpoint holds the length of that file. A run that continues cuts the file to it, and knows from it what was said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.runs.events import Evaluated, Event, Listener, Note, read_events


@dataclass
class Log:
    """The events of one run, in the file ``path``. ``listen`` hears of each one once it is in the file."""

    path: Path
    listen: Listener
    notes: list[str] = field(default_factory=list)  # so far
    evaluated: list[Evaluated] = field(default_factory=list)  # so far

    def begin(self) -> None:
        """Begin an empty file."""
        self.path.write_bytes(b"")

    def return_to(self, size: int) -> None:
        """Return to how the log was when its file had ``size`` bytes."""
        os.truncate(self.path, size)
        events = read_events(self.path)
        self.evaluated = [event for event in events if isinstance(event, Evaluated)]
        self.notes = [event.text for event in events if isinstance(event, Note)]

    @property
    def size(self) -> int:
        """The bytes of the file; 0 where there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def flush(self) -> None:
        """Every event so far is on the disk once this returns."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def add(self, event: Event) -> None:
        """Write ``event`` to the file."""
        if isinstance(event, Evaluated):
            self.evaluated.append(event)
        if isinstance(event, Note):
            self.notes.append(event.text)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_json(), allow_nan=False) + "\n")
        self.listen(event)

    def note(self, texts: Sequence[str], rnd: int) -> None:
        """Add a note for each of ``texts``."""
        for text in texts:
            self.add(Note(text, rnd))

    def note_once(self, texts: Mapping[str, str], rnd: int) -> None:
        """Add a note for each of ``texts`` whose key, with which it begins, begins no earlier note of the run."""
        said = tuple(self.notes)
        self.note([text for start, text in texts.items() if not any(each.startswith(start) for each in said)], rnd)
