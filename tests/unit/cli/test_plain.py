"""What others wrote reaches the terminal as text, and never as a command."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from coterie.cli import console
from coterie.cli.progress import Lines
from coterie.cli.status import show
from coterie.deploy.events import Refused, Stopped, Unreadable
from coterie.deploy.journal import JOURNAL, Journal, read_journal
from coterie.deploy.status import status_of
from coterie.runs.events import Event, Note, RoundDone

HOSTILE = "\x1b[2J\u202e"


def test_no_text_of_others_reaches_the_terminal_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESC and marks that turn text are shown as escapes: in the status, in a run's lines, in what commands say."""
    journal = Journal(tmp_path / JOURNAL)
    events: list[Event] = [Note(HOSTILE), RoundDone(1, {}, {HOSTILE: HOSTILE})]
    for event in [*events, Refused(HOSTILE, HOSTILE), Unreadable("train", 1, "north", HOSTILE), Stopped(HOSTILE)]:
        journal(event)
    file = StringIO()
    terminal = Console(file=file, force_terminal=True, width=300)
    show(terminal, status_of(read_journal(tmp_path)))
    for event in events:
        Lines(terminal, 1)(event)
    monkeypatch.setattr(console, "out", terminal)
    console.say(HOSTILE)
    assert "\x1b[2J" not in file.getvalue()
    assert "\u202e" not in file.getvalue()
    assert file.getvalue().count("\\x1b[2J\\u202e") >= 8
