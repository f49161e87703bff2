"""The journal added up: who took part, why others did not, and the same as Prometheus metrics."""

from __future__ import annotations

import urllib.error
import urllib.request
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.cli.status import show
from coterie.deploy.journal import JOURNAL, Journal, Reader, read_journal
from coterie.deploy.metrics import exporter, render
from coterie.deploy.status import spans, status_of
from pages import Page, make_run


def exchange(client: str, rnd: int, failed: str | None = None, kind: str = "train") -> dict[str, Any]:
    up = 0 if failed else 10
    made = {"event": "exchange", "kind": kind, "round": rnd, "client": client, "failed": failed, "at": 50.0}
    return {**made, "bytes_down": 100, "bytes_up": up, "seconds": 2.0, "site_seconds": None if failed else 0.5}


EVENTS: list[dict[str, Any]] = [
    {"event": "attempt", "attempt": 1, "sites": ["a", "b"]},
    {"event": "joined", "client": "a", "at": 1.0},
    {"event": "joined", "client": "b", "at": 1.0},
    {"event": "ready", "clients": 2, "rounds": 4},
    exchange("a", 1),
    exchange("b", 1),
    {"event": "round", "round": 1, "clients": {"a": {"loss": 0.5}, "b": {"loss": 1.5}}, "failed": {}},
    exchange("a", 2),
    exchange("b", 2, "no reply within 9 s"),
    {"event": "round", "round": 2, "clients": {"a": {"loss": 0.5}, "b": {}}, "failed": {"b": "no reply within 9 s"}},
    {"event": "late", "client": "b", "round": 2, "text": "an answer of b came late"},
    {"event": "note", "text": "the SuperLink died; starting again"},
    {"event": "attempt", "attempt": 2, "sites": ["a", "b"]},
    {"event": "resumed", "round": 1},
    exchange("a", 2),
    exchange("b", 2),
    {"event": "round", "round": 2, "clients": {"a": {"loss": 0.25}, "b": {}}, "failed": {"b": "b's norm"}},
]


def test_the_status_adds_up() -> None:
    status = status_of(EVENTS)
    a, b = status.sites["a"], status.sites["b"]
    assert (status.round, status.rounds, status.attempts, status.loss) == (2, 4, 2, 0.25)
    assert (a.rounds, b.rounds) == ([1, 2], [1])
    assert (a.bytes_down, a.bytes_up, a.seconds, a.site_seconds) == (300, 30, 6.0, 1.5)
    assert (b.bytes_down, b.bytes_up, b.late) == (300, 20, 1)
    assert [why for _, _, why in b.failures] == ["no reply within 9 s", "b's norm"]
    out = StringIO()
    show(Console(file=out, width=160), status)
    for part in ("2 of 4 rounds done", "started 2 times", "1-2", "b, train of round 2: b's norm", "came late"):
        assert part in out.getvalue()
    assert status_of([]).phase == "not started"


def test_the_report_shows_who_took_part_over_the_network(tmp_path: Path) -> None:
    """`coterie report` makes the table from the journal, of a run that has not finished too."""
    rounds = [{**e, "seconds": 2.0, "describe": {}} for e in EVENTS if e["event"] == "round"]
    make_run(tmp_path, rounds, config={"root": "/", "config": {"method": {"name": "fedit"}}})
    journal = Journal(tmp_path / JOURNAL)
    for event in EVENTS:
        journal(event)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = Page(tmp_path / "report.html").text
    for part in (
        "Over the network",
        "starts of the server 2",
        "an answer of b came late, the SuperLink died; starting again",
        "took part in missed bytes down bytes up seconds seconds at work",
        "a 1-2 - 300 B 30 B 6.0 s 1.5 s",
        "b 1 train of round 2: no reply within 9 s; train of round 2: b's norm 300 B 20 B 4.0 s 1.0 s",
    ):
        assert part in text, part


def test_spans_of_rounds() -> None:
    assert spans([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert spans([]) == "-"


def test_the_metrics_are_those_of_the_status(tmp_path: Path) -> None:
    text = render(status_of(EVENTS))
    for line in (
        "coterie_round 2",
        'coterie_replies_total{site="a",kind="train"} 3',
        'coterie_failures_total{site="b",kind="train"} 2',
        'coterie_received_bytes_total{site="b"} 20',
        'coterie_late_total{site="b"} 1',
    ):
        assert line in text.splitlines()
    journal = Journal(tmp_path / JOURNAL)
    for event in EVENTS:
        journal(event)
    with exporter(tmp_path, 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            assert page.read().decode() == text
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)


def test_a_label_cannot_end_before_its_quote() -> None:
    joined = [{"event": "joined", "client": 'a"b\\c\nd', "at": 1.0}, exchange('a"b\\c\nd', 1)]
    assert 'coterie_replies_total{site="a\\"b\\\\c\\nd",kind="train"} 1' in render(status_of(joined)).splitlines()


def test_an_answer_that_cannot_be_read_is_counted() -> None:
    bad = {"event": "unreadable", "kind": "evaluate", "round": 1, "client": "a", "reason": "its test loss is nan"}
    assert status_of([*EVENTS, bad]).sites["a"].failures == [("evaluate", 1, "its test loss is nan")]


def test_the_time_of_an_event_is_the_journals(tmp_path: Path) -> None:
    Journal(tmp_path / JOURNAL)({"event": "client", "at": "never"})
    (event,) = read_journal(tmp_path)
    assert event["at"] > 1e9


def test_a_journal_is_read_as_it_is_written(tmp_path: Path) -> None:
    reader, journal = Reader(tmp_path / JOURNAL), Journal(tmp_path / JOURNAL)
    assert list(reader.new()) == []
    journal({"event": "a", "value": float("inf")})
    assert [(e["event"], e["value"]) for e in reader.new()] == [("a", None)]
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"event": "b"')
    assert list(reader.new()) == []
    with (tmp_path / JOURNAL).open("a") as file:
        file.write("}\n")
    assert [e["event"] for e in reader.new()] == ["b"]
    assert [e["event"] for e in read_journal(tmp_path)] == ["a", "b"]
