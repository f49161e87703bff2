"""The journal added up: who took part, why others did not, and the same as Prometheus metrics."""

from __future__ import annotations

import urllib.error
import urllib.request
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from coterie import codec
from coterie.cli.main import app
from coterie.cli.status import show
from coterie.deploy.events import Exchanged, Finished, Joined, Late, Refused, ServerStarted, Unreadable
from coterie.deploy.journal import JOURNAL, Entry, Journal, Reader, read_journal
from coterie.deploy.metrics import exporter, render
from coterie.deploy.sites import KNOWN, read_known
from coterie.deploy.status import spans, status_of, table_of
from coterie.ops.accounting import Noised, spent_text
from coterie.runs.entries import ClientRound
from coterie.runs.events import ClientDone, Event, Note, Ready, Resumed, RoundDone
from coterie.runs.ledger import LEDGER, Ledger, write_ledger
from coterie.runs.ledger import Entry as Release
from coterie.types import CoterieError
from pages import Page, make_run


def exchange(client: str, rnd: int, failed: str | None = None, kind: str = "train") -> Event:
    up, at_site = (0, None) if failed else (10, 0.5)
    return Exchanged(kind, rnd, client, failed, 100, up, 2.0, at_site)


def losses(**of: float | None) -> dict[str, ClientRound]:
    return {client: ClientRound(said={} if loss is None else {"loss": loss}) for client, loss in of.items()}


EVENTS: list[Event] = [
    ServerStarted(1, ["a", "b"]),
    Joined("a"),
    Joined("b"),
    Ready(2, 4),
    exchange("a", 1),
    exchange("b", 1),
    RoundDone(1, losses(a=0.5, b=1.5), seconds=2.0),
    exchange("a", 2),
    exchange("b", 2, "no reply within 9 s"),
    RoundDone(2, losses(a=0.5, b=None), {"b": "no reply within 9 s"}, seconds=2.0),
    Late("b", 2, "an answer of b came late"),
    Note("the SuperLink died; starting again"),
    ServerStarted(2, ["a", "b"]),
    Resumed(1),
    exchange("a", 2),
    exchange("b", 2),
    RoundDone(2, losses(a=0.25, b=None), {"b": "b's norm"}, seconds=2.0),
]


def entries(events: list[Event]) -> list[Entry]:
    return [Entry(50.0, event) for event in events]


def test_the_status_adds_up() -> None:
    status = status_of(entries(EVENTS))
    a, b = status.sites["a"], status.sites["b"]
    assert (status.round, status.rounds, status.attempts, status.loss) == (2, 4, 2, 0.25)
    assert (a.rounds, b.rounds) == ([1, 2], [1])
    assert (a.bytes_down, a.bytes_up, a.seconds, a.site_seconds) == (300, 30, 6.0, 1.5)
    assert (b.bytes_down, b.bytes_up, b.late) == (300, 20, 1)
    assert [why for _, _, why in b.failures] == ["no reply within 9 s", "b's norm"]
    assert (a.replies, b.replies, b.state) == ({"train": 3}, {"train": 2}, "connected")
    assert status.notes == ["an answer of b came late", "the SuperLink died; starting again"]
    assert not any("active experts" in row for row in table_of(status)["sites"].values())
    out = StringIO()
    show(Console(file=out, width=160), status)
    for part in ("2 of 4 rounds done", "started 2 times", "1-2", "b, train of round 2: b's norm", "came late"):
        assert part in out.getvalue()
    assert status_of([]).phase == "not started"


def test_before_and_after_the_rounds() -> None:
    begun = [ServerStarted(1, ["a", "b"]), Refused("7", "its base differs")]
    status = status_of(entries([*begun, *[Late("a", 1, "late")] * 2]))
    assert (status.phase, status.round, status.rounds, status.sites["a"].late) == ("waiting for sites", 0, 0, 2)
    assert status.sites["b"].state == "never seen"
    assert status.notes[0] == "node 7 was refused: its base differs"
    assert status_of(entries([*begun, Finished(), ServerStarted(2, [])])).phase == "finished; sites join"


def test_what_fails_between_rounds_is_counted_too() -> None:
    """The end of a round names those who did not train, and nobody who did not evaluate."""
    event = exchange("a", 1, "no reply within 9 s", "evaluate")
    site = status_of(entries([exchange("a", 1), event])).sites["a"]
    assert (site.state, site.failures) == ("no reply within 9 s", [("evaluate", 1, "no reply within 9 s")])
    assert site.replies == {"train": 1}


def test_the_report_shows_who_took_part_over_the_network(tmp_path: Path) -> None:
    """`coterie report` makes the table from the journal, of a run that has not finished too."""
    rounds = [event.to_json() for event in EVENTS if isinstance(event, RoundDone)]
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


def test_a_sites_limit_of_active_experts_is_shown_where_there_is_one() -> None:
    status = status_of(entries([Joined("a"), Joined("b", active=2), Ready(2, 4)]))
    assert [site.active for site in status.sites.values()] == [None, 2]
    out = StringIO()
    show(Console(file=out, width=200), status)
    assert "active experts" in out.getvalue()
    assert "at most 2" in out.getvalue()
    assert table_of(status)["sites"]["b"]["active experts"] == 2
    without = StringIO()
    show(Console(file=without, width=200), status_of(entries(EVENTS)))
    assert "active" not in without.getvalue()


def test_what_was_spent_in_privacy_stays_when_a_later_round_fails_or_is_killed(tmp_path: Path) -> None:
    """The end of a round without a quorum has no epsilon, and a killed round has no end: the ledger counts both."""

    def shown() -> str:
        done = CliRunner().invoke(app, ["status", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    journal, one = Journal(tmp_path / JOURNAL), Release(1, "updates", Noised(2.0), "round 1")
    ledger = Ledger((one,))
    journal(Ready(2, 4))
    journal(RoundDone(1, losses(a=None), privacy=ledger.spent(1e-5)))
    journal(RoundDone(2, {}, {"a": "no reply within 9 s"}))
    assert f"privacy: {spent_text(ledger.spent(1e-5))} spent" in shown()
    more = ledger.with_entries([Release(2, "updates", Noised(2.0), "round 2")])
    write_ledger(tmp_path, more, more.spent(1e-5))
    assert f"privacy: {spent_text(more.spent(1e-5))} spent" in shown()
    write_ledger(tmp_path, ledger, ledger.spent(1e-5))  # an older one, put back
    journal(RoundDone(2, losses(a=None), privacy=more.spent(1e-5)))
    assert f"privacy: {spent_text(more.spent(1e-5))} spent" in shown()
    (tmp_path / LEDGER).write_text('{"spent": {"epsilon": "none"}}')
    damaged = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert "is damaged (spent.epsilon: " in str(damaged.exception)


def test_spans_of_rounds() -> None:
    assert spans([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert spans([5, 2, 1]) == "1-2, 5"
    assert spans([]) == "-"


def test_the_metrics_are_those_of_the_status(tmp_path: Path) -> None:
    text = render(status_of(entries(EVENTS)))
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
    joined = entries([Joined('a"b\\c\nd'), exchange('a"b\\c\nd', 1)])
    assert 'coterie_replies_total{site="a\\"b\\\\c\\nd",kind="train"} 1' in render(status_of(joined)).splitlines()


def test_an_answer_that_cannot_be_read_is_counted() -> None:
    bad = Unreadable("evaluate", 1, "a", "its test loss is nan")
    assert status_of(entries([*EVENTS, bad])).sites["a"].failures == [("evaluate", 1, "its test loss is nan")]


def test_the_time_of_an_event_is_the_journals(tmp_path: Path) -> None:
    Journal(tmp_path / JOURNAL)(ClientDone(1, "a", ClientRound(said={"at": "never"}), None))
    (entry,) = read_journal(tmp_path)
    assert entry.at > 1e9


def test_a_journal_is_read_as_it_is_written(tmp_path: Path) -> None:
    reader, journal = Reader(tmp_path / JOURNAL), Journal(tmp_path / JOURNAL)
    assert list(reader.new()) == []
    journal(RoundDone(1, losses(a=float("inf"))))
    assert [event for _, event in reader.new()] == [RoundDone(1, {"a": ClientRound(said={"loss": None})})]
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"event": "finished", "at": 5.0')
    assert list(reader.new()) == []
    with (tmp_path / JOURNAL).open("a") as file:
        file.write("}\n")
    assert list(reader.new()) == [Entry(5.0, Finished())]
    assert [entry.event.event for entry in read_journal(tmp_path)] == ["round", "finished"]


def test_an_event_of_a_later_version_is_left_out(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"event": "eclipse", "at": 1.0}\n{"event": "finished", "at": 2.0, "more": 3}\n')
    assert read_journal(tmp_path) == [Entry(2.0, Finished())]


def test_introductions_that_another_version_wrote_are_an_error_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / KNOWN).write_bytes(codec.encode({"a": {"info": 1}}))
    with pytest.raises(CoterieError, match=r"sites\.safetensors cannot be read; if another version of coterie began"):
        read_known(tmp_path)
    assert read_known(tmp_path / "none") == {}
