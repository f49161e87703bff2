"""A process that carries out one run of a comparison: ``python -m coterie.comparison.worker``.

It reads a :class:`Task` as JSON from its input, and writes events as lines of JSON to its output. The last line is
an :class:`End`, unless the run has finished. Everything else that is written goes to its errors.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from coterie.config.load import check_config
from coterie.experiment import run
from coterie.lifetime import end_with
from coterie.runs.events import Event
from coterie.runs.folder import FolderInUse
from coterie.types import CoterieError, Json

INTERRUPTED = 130


@dataclass(frozen=True)
class Task:
    """What to run: a config as JSON, where its relative paths start, and the run's folder. ``parent`` waits for it."""

    config: dict[str, Json]
    root: str
    folder: str
    resume: bool
    parent: int


@dataclass(frozen=True)
class End:
    """Why a run has no result."""

    reason: str
    in_use: bool = False


TASK, END = TypeAdapter(Task), TypeAdapter(End)


def main() -> None:
    """Carry out the task; exit with 130 when interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it
    task = TASK.validate_json(sys.stdin.read())
    end_with(task.parent)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no event

    def say(event: Event) -> None:
        lines.write(json.dumps(event.to_json()) + "\n")

    try:
        run(check_config(task.config), Path(task.folder), root=Path(task.root), resume=task.resume, listen=say)
    except CoterieError as fault:
        lines.write(END.dump_json(End(str(fault), isinstance(fault, FolderInUse))).decode() + "\n")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
