"""What runs in Flower's ServerApp, over sites in process: who may join a run that has begun, and one that has not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message as FlowerMessage

import coterie
import flower_sites
import sites
from coterie import codec
from coterie.artifacts.onboard import onboard
from coterie.deploy import server
from coterie.deploy.attempt import begin_attempt, read_attempt
from coterie.deploy.base_digest import digest_here
from coterie.deploy.events import Exchanged, Finished, Joined, Refused
from coterie.deploy.hello import Hello
from coterie.deploy.journal import JOURNAL, Journal, read_journal
from coterie.files import write_json
from coterie.flower.app import GridTransport
from coterie.flower.message import Message
from coterie.methods.fedamole import FedAMoLEState
from coterie.methods.fedit import FedIT, FedITState
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.parts import head_of
from coterie.runs import checkpoint
from coterie.runs.events import Note
from coterie.runs.folder import plain
from coterie.types import CoterieError, Instruction, Reply, Tensors
from grid import InProcessGrid

FIRST, LATE = ["mood-0", "place-0", "size-0"], "mood-1"
Round = tuple[str, int]  # a site, and the number of a round
SHARED: dict[str, Any] = {"task": {"head": "shared"}}
WHY = "its experts are dealt at the start"


class DiedError(Exception):
    """The server is gone."""


def attempt(
    folder: Path,
    there: list[str],
    listed: list[str],
    dies_in: str = "",
    comes: str = "",
    lies: Callable[[str, Hello], Hello] = lambda client, hello: hello,
    sees: Callable[[str, Message, Message], None] = lambda client, message, answer: None,
    **changes: Any,
) -> None:
    """Start the server once more, with some sites there and some listed; it may die in a round.

    ``comes`` connects in round 1. ``lies``: what a site says of itself. ``sees`` gets each
    message to a site and its answer.
    """
    torch.set_num_threads(1)
    federation = {"sites": listed, "at_least": 3, "wait": 5.0, "greeting": 0.0, **changes.pop("federation", {})}
    config = flower_sites.server_config(folder / "run.toml", federation=federation, **changes)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", {"root": str(folder), "config": plain(config)})
    begin_attempt(out, {})
    staff = flower_sites.workers(folder, [*there, *([comes] if comes else [])])

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        if dies_in and message.metadata.group_id == dies_in:
            raise DiedError
        if comes and message.metadata.group_id == "1":
            grid.sites[99] = answering(comes)
        return message

    def answering(client: str) -> Callable[[Message], Message]:
        def answer(message: Message) -> Message:
            made = staff[client].answer(message)
            sees(client, message, made)
            if message.head["kind"] != "query.hello":
                return made
            return Message(made.head, codec.encode(lies(client, codec.decode(Hello, made.body))))

        return answer

    grid = InProcessGrid({11 + i: answering(c) for i, c in enumerate(there)}, spoil=spoil)
    server.run(GridTransport(grid, pause=0.01), out, Journal(out / JOURNAL))


def test_every_message_says_where_earlier_attempts_began(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    told: list[tuple[int, object]] = []

    def sees(client: str, message: Message, answer: Message) -> None:
        told.append((message.head["attempt"], message.head["starts"]))

    out = tmp_path / "out"
    with pytest.raises(DiedError):
        attempt(tmp_path, FIRST, FIRST, dies_in="2", sees=sees)
    old = json.loads((out / "attempt.json").read_text())
    assert old.pop("starts") == [[1, 0]]
    with pytest.raises(DiedError):
        attempt(tmp_path, FIRST, FIRST, dies_in="3", sees=sees)
    attempt(tmp_path, FIRST, FIRST, sees=sees)
    assert read_attempt(out).starts == ((1, 0), (2, 1), (3, 2))
    assert {(n, str(starts)) for n, starts in told} == {(1, "[]"), (2, "[[1, 0]]"), (3, "[[1, 0], [2, 1]]")}
    write_json(out / "attempt.json", old)  # as older versions wrote it
    assert read_attempt(out).starts == ()
    assert begin_attempt(out, {}).number == 2


def who_took_part(folder: Path) -> tuple[set[str], set[str]]:
    """The sites of the journal, and why others were refused."""
    events = [entry.event for entry in read_journal(folder / "out")]
    assert events[-1] == Finished()
    there = {event.client for event in events if isinstance(event, Joined | Exchanged)}
    return there, {event.reason for event in events if isinstance(event, Refused)}


@pytest.mark.parametrize("dies_in", ["1", "2"])
@pytest.mark.parametrize("listed", [FIRST, []], ids=["sites by name", "any site"])
def test_nobody_joins_later_where_that_cannot_be_and_it_says_so(
    listed: list[str], dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FedIT, "newcomers", WHY)
    sites.config(tmp_path, method="fedit")
    with pytest.raises(DiedError):
        attempt(tmp_path, FIRST, listed, dies_in=dies_in)
    for _ in range(2):  # what the first try left behind must not let it in at the second
        with pytest.raises(CoterieError) as told:
            attempt(tmp_path, [*FIRST, LATE], [*FIRST, LATE])
        assert f"mood-1 cannot join now: {WHY}; remove" in str(told.value)
    attempt(tmp_path, [LATE, *FIRST], listed)
    assert who_took_part(tmp_path) == ({*FIRST}, {f"mood-1 did not take part from the start, and {WHY}"})


@pytest.mark.parametrize("listed", [[*FIRST, LATE], []], ids=["missed the start", "any site"])
def test_a_site_that_connects_too_late_is_refused_and_the_run_goes_on(
    listed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FedIT, "newcomers", WHY)
    sites.config(tmp_path, method="fedit")
    attempt(tmp_path, FIRST, listed, comes=LATE)
    assert who_took_part(tmp_path) == ({*FIRST}, {f"mood-1 did not take part from the start, and {WHY}"})


@pytest.mark.parametrize(
    ("rows", "privacy", "why"),
    [
        (200_000, {"epsilon": 8.0}, "client mood-1 has 200000 training rows, and publishing one of them"),
        (2, {"noise_multiplier": 0.5}, "would cost client mood-1, which has 2 training rows, epsilon = "),
        (0, {"epsilon": 8.0}, "client mood-1 has no training rows"),
    ],
)
def test_a_site_whose_rows_nothing_would_protect_is_refused_and_the_others_run(
    rows: int, privacy: dict[str, Any], why: str, tmp_path: Path
) -> None:
    sites.config(tmp_path, method="fedit", rows=40)

    def lies(client: str, hello: Hello) -> Hello:
        return replace(hello, info=replace(hello.info, num_train=rows if client == LATE else 40))

    example = {"unit": "example", "clip": 0.5, **privacy}
    of: dict[str, Any] = {"privacy": example, "lora": {"dropout": 0.0}, "run": {"rounds": 2, "export": "last"}}
    of["train"] = {"batch_size": 2, "steps": 10}
    attempt(tmp_path, [*FIRST, LATE], [*FIRST, LATE], lies=lies, **of)
    there, reasons = who_took_part(tmp_path)
    assert there == {*FIRST}
    (reason,) = reasons
    assert why in reason
    assert "mood-1 stays out of this run: " in reason


def test_a_federation_that_began_before_the_refusal_continues_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites.config(tmp_path, method="fedit")
    privacy = {"unit": "example", "clip": 0.5, "noise_multiplier": 0.1}
    of: dict[str, Any] = {"privacy": privacy, "lora": {"dropout": 0.0}, "run": {"rounds": 2, "export": "last"}}
    with monkeypatch.context() as patch:
        for module in ("runs.cost", "deploy.server"):
            patch.setattr(f"coterie.{module}.unprotected", lambda *args: None)
        with pytest.raises(DiedError):
            attempt(tmp_path, FIRST, FIRST, dies_in="2", **of)
    attempt(tmp_path, FIRST, FIRST, **of)
    there, reasons = who_took_part(tmp_path)
    assert (there, reasons) == ({*FIRST}, set())
    said = [entry.event.text for entry in read_journal(tmp_path / "out") if isinstance(entry.event, Note)]
    assert [text for text in said if "The run began so and continues: do not call it private" in text]


def heads_of(folder: Path, method: str) -> tuple[dict[Round, Tensors], dict[Round, Tensors]]:
    """The heads that sites received and sent in a run that ``LATE`` joins, by site and round."""
    sites.config(folder, method=method)
    received, sent = dict[Round, Tensors](), dict[Round, Tensors]()

    def sees(client: str, message: Message, answer: Message) -> None:
        if message.head["kind"] == "train":
            at = client, int(message.head["round"])
            received[at] = head_of(codec.decode(Instruction, message.body).tensors)
            sent[at] = head_of(codec.decode(Reply, answer.body).tensors)

    attempt(folder, FIRST, [*FIRST, LATE], comes=LATE, sees=sees, **SHARED)
    assert who_took_part(folder) == ({*FIRST, LATE}, set())
    assert {rnd for client, rnd in received if client == LATE} == {2, 3}
    assert (folder / "out" / "clients" / LATE).is_dir() == (folder / "out" / "clients" / "mood-0").is_dir()
    return received, sent


@pytest.mark.parametrize(
    "method", ["fedit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ifca", "fedamole"))]
)
def test_a_late_site_starts_from_the_shared_head_of_its_labels_and_counts_in_its_mean(
    method: str, tmp_path: Path
) -> None:
    received, sent = heads_of(tmp_path, method)
    for rnd in (2, 3):
        mine, other = received[LATE, rnd], received["mood-0", rnd]
        assert mine.keys() == other.keys() != set()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
        assert any(not torch.equal(mine[key], received["mood-0", 1][key]) for key in mine)
    if method != "ifca":  # there, a head for each LoRA
        both = sent[LATE, 2], sent["mood-0", 2]  # of as many rows
        for key, value in received[LATE, 3].items():
            torch.testing.assert_close(value, (both[0][key] + both[1][key]) / 2)
            assert not torch.equal(both[0][key], both[1][key])


def test_a_late_site_of_fedlease_gets_the_shared_head_of_its_cluster_and_labels(tmp_path: Path) -> None:
    received, sent = heads_of(tmp_path, "fedlease")
    assert not received[LATE, 2]  # it warms up
    state = checkpoint.load(tmp_path / "out" / "checkpoints", 2, FedLEASEState).state
    assert state.heads.group[LATE] == f'{state.cluster_of(LATE)}:["bad", "good"]'
    assert received[LATE, 3].keys() == sent[LATE, 3].keys() != set()
    assert all(torch.equal(value, state.heads.of(LATE)[key]) for key, value in received[LATE, 3].items())


def test_a_server_that_dies_goes_on_with_a_late_site_and_the_shared_head(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    for there, dies_in in ((FIRST, "2"), ([*FIRST, LATE], "3")):
        with pytest.raises(DiedError):
            attempt(tmp_path, there, there, dies_in=dies_in, **SHARED)
    attempt(tmp_path, [*FIRST, LATE], [*FIRST, LATE], **SHARED)
    assert who_took_part(tmp_path) == ({*FIRST, LATE}, set())
    state = checkpoint.load(tmp_path / "out" / "checkpoints", 3, FedITState).state
    assert state.heads.group[LATE] == '["bad", "good"]'


@pytest.mark.parametrize(
    "dies_in", ["", pytest.param("2", marks=pytest.mark.slow)], ids=["at once", "at the next start"]
)
def test_a_late_site_whose_labels_have_no_shared_head_is_refused_and_the_run_goes_on(
    dies_in: str, tmp_path: Path
) -> None:
    sites.config(tmp_path, method="fedit")
    there = ["mood-0", LATE, "size-0"]
    if dies_in:
        with pytest.raises(DiedError):
            attempt(tmp_path, there, [], dies_in=dies_in, **SHARED)
        attempt(tmp_path, [*there, "place-0"], [], **SHARED)
    else:
        attempt(tmp_path, there, [], comes="place-0", **SHARED)
    took_part, (reason,) = who_took_part(tmp_path)
    assert took_part == {*there}
    assert reason.startswith('place-0 came after the start, and its labels ["city", "land"] have no head in this run')
    assert 'those of the run are ["bad", "good"] or ["big", "small", "tiny"].' in reason
    assert "list them all in its [data] labels" in reason
    assert "--onboard" in reason


def test_a_site_that_connects_late_takes_part_in_fedamole_from_the_next_round_on(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedamole")
    attempt(tmp_path, FIRST, [], comes=LATE)
    assert_it_joined_fedamole(tmp_path)


def test_a_server_that_dies_goes_on_with_the_late_site_of_fedamole(tmp_path: Path) -> None:
    """From a checkpoint with more clients than the run began with."""
    sites.config(tmp_path, method="fedamole")
    for there, dies_in in ((FIRST, "2"), ([*FIRST, LATE], "3")):
        with pytest.raises(DiedError):
            attempt(tmp_path, there, there, dies_in=dies_in)
    attempt(tmp_path, [*FIRST, LATE], [*FIRST, LATE])
    assert_it_joined_fedamole(tmp_path)


def assert_it_joined_fedamole(folder: Path) -> None:
    """``LATE`` took part in rounds 2 and 3, held experts of the pool in the second of them, and is in the report."""
    there, refused = who_took_part(folder)
    assert (there, refused) == ({*FIRST, LATE}, set())
    events = [entry.event for entry in read_journal(folder / "out")]
    trained = {str(e.round) for e in events if isinstance(e, Exchanged) and e.client == LATE and e.kind == "train"}
    assert trained == {"2", "3"}
    state = checkpoint.load(folder / "out" / "checkpoints", 3, FedAMoLEState).state
    assert state.clients == (*FIRST, LATE)
    for z in state.holds.values():  # chosen after its first round
        assert z.shape == (8, 4)
        assert (z.sum(0) >= 2).all()
        assert {*z.sum(1).tolist()} == {0, 4}  # all sites are one group
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert set(summary["clients"]) == {*FIRST, LATE}
    assert LATE in (folder / "out" / "report.html").read_text()


def test_a_site_that_comes_after_the_end_joins_with_three_files_of_the_server(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedamole")
    attempt(tmp_path, FIRST, FIRST)
    given = tmp_path / "given"
    for name in ("config.json", "summary.json"):
        given.mkdir(exist_ok=True)
        shutil.copyfile(tmp_path / "out" / name, given / name)
    shutil.copytree(tmp_path / "out" / "checkpoints", given / "checkpoints")
    own_base = str((tmp_path / "model").rename(tmp_path / "base-of-the-site"))
    joined = onboard(given, tmp_path / "clients" / LATE, tmp_path / "joined", epochs=1, base=own_base)
    assert joined.client == LATE
    assert joined.before["loss"] != joined.after["loss"]
    assert coterie.load(tmp_path / "joined", base=own_base).bank.gate.name == "scaled_dot_product"


LIES: dict[str, Callable[[Hello], Hello]] = {
    "base": lambda hello: replace(hello, base="wrong"),
    "rows": lambda hello: replace(hello, info=replace(hello.info, num_train=3)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_first_hello_can_be_mended_before_the_run_begins(name: str, tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")

    def wrong(client: str, hello: Hello) -> Hello:
        return LIES[name](hello) if client == FIRST[0] else hello

    there = FIRST if name == "base" else FIRST[:1]  # alone, nobody contradicts it
    with pytest.raises(CoterieError, match=r"sites are connected after 5 s; missing"):
        attempt(tmp_path, there, FIRST, lies=wrong)
    attempt(tmp_path, FIRST, FIRST)
    assert who_took_part(tmp_path)[0] == {*FIRST}
    reasons = {e.reason for _, e in read_journal(tmp_path / "out") if isinstance(e, Refused)}
    assert [reason.split(" (")[0] for reason in reasons] == (["mood-0 has another base"] if name == "base" else [])


def wider(hello: Hello) -> Hello:
    """The right files, and another description of them."""
    first, *others = hello.spec.targets
    return replace(hello, spec=replace(hello.spec, targets=(replace(first, d_in=first.d_in + 1), *others)))


@pytest.mark.parametrize("lie", [wider, LIES["base"]])
@pytest.mark.parametrize("pinned", [False, True], ids=["the server's base", "a pinned digest"])
def test_a_first_site_with_a_false_base_keeps_no_honest_site_out(
    pinned: bool, lie: Callable[[Hello], Hello], tmp_path: Path
) -> None:
    """``any site`` may come, and the liar is the first node: its word counts for nothing."""
    sites.config(tmp_path, method="fedit")
    honest, liar = FIRST[1:], FIRST[0]
    federation: dict[str, Any] = {"at_least": 2, "sites": []}
    changes: dict[str, Any] = {}
    if pinned:
        config = flower_sites.server_config(tmp_path / "run.toml")
        federation["base"] = digest_here(config, tmp_path, tmp_path)
        changes = {"model": {"path": "not-here"}}
    attempt(
        tmp_path,
        [liar, *honest],
        [],
        lies=lambda client, hello: lie(hello) if client == liar else hello,
        federation=federation,
        **changes,
    )
    there, refused = who_took_part(tmp_path)
    assert there == {*honest}
    assert [reason.split(" (")[0] for reason in refused] == [f"{liar} has another base"]


def test_a_server_without_the_base_and_without_its_digest_says_so(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    with pytest.raises(CoterieError, match=r"this machine does not have the base 'not-here'.*\[federation\] base"):
        attempt(tmp_path, FIRST, FIRST, model={"path": "not-here"})


def test_what_a_site_said_holds_once_the_run_has_begun(tmp_path: Path) -> None:
    sites.config(tmp_path, method="fedit")
    with pytest.raises(DiedError):
        attempt(tmp_path, FIRST, FIRST, dies_in="1")
    with pytest.raises(CoterieError, match="missing: mood-0"):
        attempt(tmp_path, FIRST[:1], FIRST[:1], lies=lambda client, hello: LIES["rows"](hello))
    (reason,) = {e.reason for _, e in read_journal(tmp_path / "out") if isinstance(e, Refused)}
    assert reason.startswith("the rows or labels of mood-0 have changed since the run began")
