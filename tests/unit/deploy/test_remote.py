"""The engine of a real federation, over Flower's messages in process: bad answers, late ones, missing ones, resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage

import flower_sites
import sites
from coterie import codec
from coterie.deploy.events import Back, Exchanged, Joined, Late, Refused, Unreadable
from coterie.deploy.hello import Hello
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.worker import Worker
from coterie.engines.base import Evaluation
from coterie.flower.app import GridTransport
from coterie.flower.message import Message, pack, unpack
from coterie.requests import ExpertUse, Observed, Sample
from coterie.runs.events import Event, Note
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.types import Bank, CoterieError, GateSpec, Key, Part, Target
from grid import InProcessGrid
from spoiled import SPOILED

CLIENTS = ["mood-0", "mood-1", "place-0", "size-0"]
VICTIM, NODE = "mood-1", 12
TARGET = "bert.encoder.layer.0.attention.self.query"
AK, BK = Key(TARGET, 0, Part.A), Key(TARGET, 0, Part.B)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fedit(tmp_path: Path) -> tuple[Path, dict[str, Worker]]:
    path = sites.config(tmp_path, method="fedit")
    return path, flower_sites.workers(tmp_path, CLIENTS)


def run(engine: RemoteEngine, config: Any, folder: Path, **rounds: Any) -> Any:
    folder.mkdir(exist_ok=True)
    settings = RoundSettings(**{"rounds": 3, "seed": 0, **rounds})
    return Runner(flower_sites.method_of(config), engine, settings, folder).run()


def rounds_in(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "round"]


def spoiled(change: Callable[[Message], Message]) -> Callable[[FlowerMessage], FlowerMessage]:
    """The change of a message as one of Flower's that holds it."""

    def spoil(message: FlowerMessage) -> FlowerMessage:
        message.content = pack(change(unpack(message.content)))
        return message

    return spoil


def flower_error(message: FlowerMessage, text: str) -> FlowerMessage:
    made = FlowerMessage(Error(8, text), reply_to=message)
    made.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    return made


def unreadable(message: FlowerMessage) -> FlowerMessage:
    message.content = RecordDict({"head": ConfigRecord({"json": "{}"})})
    return message


BAD: dict[str, tuple[Callable[[FlowerMessage], FlowerMessage], str]] = {
    **{name: (spoiled(change), reason) for name, (change, reason) in SPOILED.items()},
    "not a message": (unreadable, "is not exactly a head and a body"),
    "Flower's error": (lambda m: flower_error(m, "killed\nat line"), "Flower reports error 8: killed"),
}


def test_a_bad_answer_is_left_out_with_the_reason_and_the_round_goes_on(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        """In round i the victim's answer is bad in the i-th way; a message's group is its round."""
        if node != NODE or message.metadata.message_type != "train":
            return message
        return [*BAD.values()][int(message.metadata.group_id) - 1][0](message)

    engine = flower_sites.engine_over(config, staff, sites=tuple(CLIENTS), spoil=spoil)
    engine.sites.gather(0, 10)
    run(engine, config, tmp_path / "run", rounds=len(BAD), evaluate_every=99)
    failed = [event["failed"] for event in rounds_in(tmp_path / "run")]
    assert [list(f) for f in failed] == [[VICTIM]] * len(BAD)
    for (name, (_, reason)), found in zip(BAD.items(), failed, strict=True):
        assert reason in found[VICTIM], name


def test_thirty_percent_of_the_answers_missing_over_ten_rounds(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)
    draw, lost = random.Random(3), []

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage | None:
        if message.metadata.message_type in ("train", "evaluate") and draw.random() < 0.3:
            lost.append(message.metadata.message_type)
            return None
        return message

    engine = flower_sites.engine_over(config, staff, spoil=spoil)
    engine.sites.gather(len(CLIENTS), 10)
    run(engine, config, tmp_path / "run", rounds=10, quorum=0.25)
    failed = [reason for event in rounds_in(tmp_path / "run") for reason in event["failed"].values()]
    assert len(rounds_in(tmp_path / "run")) == 10
    assert len(failed) == lost.count("train") > 3
    assert all("no reply within 30 s" in reason for reason in failed)


class SlowGrid(InProcessGrid):
    """Holds back the answers of one node until it is told to let go."""

    held: bool = True

    def _reply(self, ticket: str) -> Any:
        message = self.waiting.get(ticket)
        if self.held and message and message.metadata.dst_node_id == NODE and message.metadata.message_type == "train":
            return
        yield from super()._reply(ticket)


def test_a_late_answer_is_dropped_and_noted(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()
    grid = SlowGrid({11 + i: staff[c].answer for i, c in enumerate(CLIENTS)})
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.sites.transport = GridTransport(grid)
    engine.sites.gather(len(CLIENTS), 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    one = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert "no reply within 30 s" in str(one[VICTIM].error)
    assert sum(delivery.error is None for delivery in one.values()) == 3
    grid.held = False
    two = dict(engine.train(method, method.configure(state, engine.clients, 2), 2))
    assert [d.error for d in two.values()] == [None] * 4
    (late,) = [event for event in heard if isinstance(event, Late)]
    assert (late.client, late.round) == (VICTIM, 1)


@pytest.mark.parametrize("kind", ["query.hello", "train"])
def test_an_answer_to_no_message_of_the_server_is_dropped(kind: str, fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        if node == NODE and message.metadata.message_type == kind:
            message.metadata.__dict__["_reply_to_message_id"] = "nobody's"
        return message

    engine = flower_sites.engine_over(config, staff, spoil=spoil, note=heard.append)
    there = 3 if kind == "query.hello" else 4
    engine.sites.gather(there, 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    for rnd in (1, 2):
        done = dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))
        assert len(done) == there
        assert [c for c in done if done[c].error is None] == [c for c in CLIENTS if c != VICTIM]
    assert [e.text for e in heard if isinstance(e, Note)] == [
        "a message arrived that answers no request of the server; such messages are dropped"
    ]


def test_a_site_that_leaves_is_missed_and_comes_back_as_another_node(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.sites.gather(len(CLIENTS), 10)
    grid = engine.sites.transport.grid  # type: ignore[attr-defined]
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    answer = grid.sites.pop(NODE)
    gone = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert gone[VICTIM].error == "the site is not connected"
    assert engine.sites.clock() < 30  # it was waited for, and not for the whole round
    at = engine.sites.clock()
    dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert engine.sites.clock() == at  # and not a second time
    grid.sites[99] = answer
    back = dict(engine.train(method, method.configure(state, engine.clients, 2), 2))
    assert back[VICTIM].error is None
    assert [e.node for e in heard if isinstance(e, Back)] == ["99"]


def test_a_site_that_is_back_as_another_node_is_sent_its_message_at_once(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()
    grid = SlowGrid({11 + i: staff[c].answer for i, c in enumerate(CLIENTS)})
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.sites.transport = GridTransport(grid)
    engine.sites.gather(len(CLIENTS), 10)
    slept = engine.sites.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.sites.clock() > 5:  # started again; Flower takes the old node for alive
            grid.sites.setdefault(99, staff[VICTIM].answer)

    engine.sites.sleep = sleep
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    one = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert one[VICTIM].error is None
    assert 5 < engine.sites.clock() < 10
    assert [e.node for e in heard if isinstance(e, Back)] == ["99"]


def test_a_site_that_comes_back_in_time_is_sent_its_message_again(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, calls = flower_sites.server_config(path), 0

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        nonlocal calls
        calls += node == NODE and message.metadata.message_type == "train"
        bad = node == NODE and message.metadata.message_type == "train" and calls < 3
        return flower_error(message, "the node is gone") if bad else message

    engine = flower_sites.engine_over(config, staff, spoil=spoil, greeting=20.0)
    engine.sites.gather(len(CLIENTS), 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    one = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert one[VICTIM].error is None
    assert calls == 3


@pytest.mark.parametrize("name", ["local", "fedlease"])
def test_a_server_that_died_goes_on_with_the_sites_states_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, method=name)
    config = flower_sites.server_config(path)
    whole_staff = flower_sites.workers(tmp_path, CLIENTS, site={"state": "whole"})
    whole = flower_sites.engine_over(config, whole_staff)
    whole.sites.gather(4, 10)
    state = run(whole, config, tmp_path / "whole-run")

    class DiedError(Exception): ...

    def dies(node: int, message: FlowerMessage) -> FlowerMessage:
        if message.metadata.message_type == "evaluate" and message.metadata.group_id == "2":
            raise DiedError
        return message

    staff = flower_sites.workers(tmp_path, CLIENTS)
    engine = flower_sites.engine_over(config, staff, spoil=dies)
    engine.sites.gather(4, 10)
    with pytest.raises(DiedError):
        run(engine, config, tmp_path / "run")
    assert all((w.state / "run" / "personal" / c / "000002.safetensors").exists() for c, w in staff.items())
    again = flower_sites.engine_over(config, staff, attempt=2)
    again.sites.gather(4, 10)
    assert codec.encode(run(again, config, tmp_path / "run")) == codec.encode(state)
    for client, worker in staff.items():
        mine, others = (w.state / "run" / "personal" / client for w in (worker, whole_staff[client]))
        assert [p.read_bytes() for p in sorted(mine.iterdir())] == [p.read_bytes() for p in sorted(others.iterdir())]
    method = flower_sites.method_of(config)
    stale = dict(engine.train(method, method.configure(state, engine.clients, 4), 4))
    assert {d.error for d in stale.values()} == {"the message is from attempt 1, but attempt 2 has begun"}


@pytest.mark.parametrize(
    ("starts", "left"),
    [(((1, 0), (2, 1)), [1, 4]), (((1, 0), (2, 1), (3, 2)), [1, 4]), (((1, 0), (2, 2)), [1, 2, 4]), ((), [1, 2, 4])],
    ids=["one missed", "two missed", "nothing undone", "a server that does not say"],
)
def test_a_site_that_missed_a_start_goes_back_as_far_as_that_start_did(
    starts: tuple[tuple[int, int], ...], left: list[int], tmp_path: Path
) -> None:
    config = flower_sites.server_config(sites.config(tmp_path, method="feddpa"), run={"rounds": 9})
    staff = flower_sites.workers(tmp_path, CLIENTS[:1])
    engine = flower_sites.engine_over(config, staff, sites=tuple(staff))
    engine.sites.gather(0, 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    ((client, worker),) = staff.items()

    def train(attempt: int, since: int, rnd: int, starts: tuple[tuple[int, int], ...] = ()) -> None:
        of = replace(engine.sites.agreement, attempt=attempt, starts=starts)
        body = codec.encode(method.configure(state, engine.clients, rnd)[client])
        answer = worker.answer(of.message("train", client, rnd, body=body, since=since))
        assert "error" not in answer.head

    train(1, 0, 1)
    train(1, 0, 2)  # undone by the start of attempt 2, which the site misses
    train(4, 3, 4, starts)
    kept = (worker.state / "run" / "personal" / client).iterdir()
    assert sorted(int(path.stem) for path in kept) == left


@pytest.mark.parametrize("name", ["fedlease", "fedit"])
def test_a_site_may_join_and_another_leave_between_two_starts(name: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, method=name)
    staff = flower_sites.workers(tmp_path, CLIENTS)
    config = flower_sites.server_config(path)
    some = {c: staff[c] for c in CLIENTS[:3]}
    engine = flower_sites.engine_over(config, some, sites=tuple(some))
    engine.sites.gather(0, 10)
    run(engine, config, tmp_path / "run", rounds=2)
    others = {c: staff[c] for c in CLIENTS[1:]}
    again = flower_sites.engine_over(config, others, attempt=2, sites=tuple(others))
    again.sites.known.update(engine.sites.known)
    again.sites.gather(0, 10)
    run(again, config, tmp_path / "run", rounds=5)
    assert [(sorted(e["clients"]), e["failed"]) for e in rounds_in(tmp_path / "run")] == [
        *[(CLIENTS[:3], {})] * 2,
        *[(CLIENTS[1:], {})] * 3,
    ]


def test_rows_that_changed_are_refused(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, staff = fedit
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff)
    engine.sites.gather(4, 10)
    info = replace(engine.sites.known[VICTIM].info, num_train=99)
    heard: list[Event] = []
    again = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append)
    again.sites.known.update({**engine.sites.known, VICTIM: replace(engine.sites.known[VICTIM], info=info)})
    again.sites.gather(3, 10)
    assert ["have changed since the run began" in e.reason for e in heard if isinstance(e, Refused)] == [True]


def test_a_site_with_the_wrong_base_comes_back_with_the_right_one(fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    heard: list[Event] = []
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append, sites=tuple(CLIENTS))
    grid = engine.sites.transport.grid  # type: ignore[attr-defined]
    right = grid.sites[11]

    def wrong(message: Message) -> Message:
        made = right(message)
        return Message(made.head, codec.encode(replace(codec.decode(Hello, made.body), base="another")))

    grid.sites[11], slept = wrong, engine.sites.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.sites.clock() > 5 and 11 in grid.sites:  # its people mend it, and start it again
            del grid.sites[11]
            grid.sites[99] = right

    engine.sites.sleep = sleep
    engine.sites.gather(0, 60)
    assert sorted(engine.sites.known) == CLIENTS
    assert len({hello.base for hello in engine.sites.known.values()}) == 1
    assert all("not another as mood-0); use the same" in e.reason for e in heard if isinstance(e, Refused))


def test_of_two_nodes_with_one_name_the_latest_is_the_site_until_it_is_gone(
    fedit: tuple[Path, dict[str, Worker]],
) -> None:
    path, staff = fedit
    heard: list[Event] = []
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append)
    there, grid = engine.sites, engine.sites.transport.grid  # type: ignore[attr-defined]

    def looked(seconds: int) -> int:
        for _ in range(seconds):
            there.sleep(1.0)
            there.refresh()
        return there.nodes[VICTIM]

    there.gather(4, 10)
    grid.sites[98] = grid.sites[NODE]
    assert [looked(100), looked(100)] == [98, 98]
    grid.sites[99] = grid.sites[NODE]
    assert [looked(100), looked(100)] == [99, 99]
    del grid.sites[98]
    assert looked(100) == 99  # and not the first again
    del grid.sites[99]
    assert looked(100) == NODE
    told = [(e.node, e.instead_of) for e in heard if isinstance(e, Back)]
    assert told == [("98", str(NODE)), ("99", "98"), (str(NODE), None)]


def test_the_answer_of_a_node_that_is_gone_counts_no_more(fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    heard: list[Event] = []
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append)
    there, grid = engine.sites, engine.sites.transport.grid  # type: ignore[attr-defined]
    pull, answered = grid.pull_messages, list[FlowerMessage]()

    def only_now(tickets: list[str]) -> list[FlowerMessage]:
        """The first site's answer has come, and is read after its node has left."""
        found = [m for m in answered if m.metadata.reply_to_message_id in tickets]
        return found or pull(tickets)

    grid.pull_messages = lambda tickets: []
    there.refresh()
    answered += pull([ticket for ticket, node in there._greetings.items() if node == NODE])
    assert len(answered) == 1
    grid.sites[99], grid.pull_messages = grid.sites.pop(NODE), only_now
    for _ in range(9):
        there.refresh()
    assert there.nodes[VICTIM] == 99
    assert not there.asking
    assert [e.node for e in heard if isinstance(e, Joined) and e.client == VICTIM] == ["99"]


def test_for_a_stranger_who_says_nothing_no_absent_site_is_waited_for(
    fedit: tuple[Path, dict[str, Worker]],
) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage | None:
        return None if node == 99 else message

    engine = flower_sites.engine_over(config, staff, spoil=spoil, greeting=20.0)
    there, grid = engine.sites, engine.sites.transport.grid  # type: ignore[attr-defined]
    there.gather(4, 10)
    method = flower_sites.method_of(config)
    instructions = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    grid.sites[99] = grid.sites.pop(NODE)
    took = []
    for _ in range(3):  # it may be the one that is missed, for a while
        began = there.clock()
        assert dict(engine.train(method, instructions, 1))[VICTIM].error == "the site is not connected"
        took.append(there.clock() - began)
    assert took[0] > 20
    assert took[-1] == 0


def test_who_said_hello_and_left_before_the_start_is_no_client(fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, sites=(*CLIENTS, "someone"))
    grid, slept = engine.sites.transport.grid, engine.sites.sleep  # type: ignore[attr-defined]

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.sites.clock() > 5:
            grid.sites.pop(NODE, None)

    engine.sites.sleep = sleep
    engine.sites.gather(3, 10)
    assert 10 <= engine.sites.clock() < 11  # so long it waits for someone
    assert [c.id for c in engine.clients] == ["mood-0", "place-0", "size-0"]


def with_padding(message: FlowerMessage, size: int) -> FlowerMessage:
    inner = unpack(message.content)
    message.content = pack(Message(inner.head, inner.body + bytes(size)))
    return message


@pytest.mark.parametrize(("kind", "size"), [("query.hello", 2**24), ("train", 2**22), ("evaluate", 2**26)])
def test_an_answer_with_more_bytes_than_it_may_have_is_not_decoded(
    kind: str, size: int, fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    """Decoded, it would only be said to be damaged."""
    path, staff = fedit
    heard, some = list[Event](), {c: staff[c] for c in CLIENTS[:2]}
    config = flower_sites.server_config(path)

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        return with_padding(message, size) if node == NODE and message.metadata.message_type == kind else message

    engine = flower_sites.engine_over(config, some, spoil=spoil, note=heard.append)
    engine.sites.gather(1 if kind == "query.hello" else 2, 10)
    run(engine, config, tmp_path / "run", rounds=1)
    reasons = {
        "query.hello": [e.reason for e in heard if isinstance(e, Refused)],
        "train": [f[VICTIM] for event in rounds_in(tmp_path / "run") if (f := event["failed"])],
        "evaluate": [e.failed for e in heard if isinstance(e, Exchanged) and e.failed],
    }[kind]
    assert len(reasons) == 1
    assert str(reasons[0]).startswith("the reply cannot be read: it is larger than the ")


def test_who_does_not_fit_is_refused(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)

    def reasons(**agreed: Any) -> set[str]:
        heard: list[Event] = []
        engine = flower_sites.engine_over(config, staff, note=heard.append, **agreed)
        with pytest.raises(CoterieError, match=r"sites are connected after 20 s; missing"):
            engine.sites.gather(4, 20)
        return {event.reason for event in heard if isinstance(event, Refused)}

    assert reasons(sites=("mood-0", "mood-1", "place-0", "someone")) == {"size-0 is not among [federation] sites"}
    assert len(reasons(base="abc", sites=tuple(CLIENTS))) == 4
    assert {r.partition(" reports ")[2] for r in reasons(max_rows=11)} == {
        "12 training rows, more than 11 ([federation] max_rows)"
    }
    assert any("key belongs to an unknown site" in r for r in reasons(keys={"digest": "mood-0"}))
    staff[VICTIM] = flower_sites.workers(tmp_path, [VICTIM], policy={"methods": ["fedlease"]})[VICTIM]
    assert reasons() == {"this site does not run fedit, only fedlease ([policy] methods)"}


LONG = "x" * 501
NO_SITE: dict[str, tuple[Callable[[Hello], Hello], str]] = {
    "a path": (lambda h: with_info(h, id="../../evil"), "'../../evil' is not a valid folder name"),
    "a quote": (lambda h: with_info(h, id='evil"x'), "is not a valid folder name"),
    "rows": (lambda h: with_info(h, num_train=10**400), "numbers of rows are out of range"),
    "test rows": (lambda h: with_info(h, num_test=10**14), "reports 100000000000000 test rows, more than 10000000"),
    "fewer than none": (lambda h: with_info(h, num_test=-1), "numbers of rows are out of range"),
    "labels": (lambda h: with_info(h, labels=tuple(map(str, range(20_000)))), "too many labels"),
    "a label": (lambda h: with_info(h, labels=("a", LONG)), "too long"),
    "a group": (lambda h: with_info(h, group=LONG), "too long"),
    "a label that a terminal obeys": (lambda h: with_info(h, labels=("a", "\x1b[2J")), "that cannot be shown"),
    "a group that turns text": (lambda h: with_info(h, group="\u202e"), "that cannot be shown"),
    "an id in capital letters": (lambda h: with_info(h, id=f"{CLIENTS[0].upper()}"), "only in capital letters"),
    "a base": (lambda h: replace(h, base="\x1b[2J"), "hash that is not a SHA-256"),
    "a side": (lambda h: replace(h, spec=replace(h.spec, targets=(Target("q", 10**12, 1),))), "sizes out of range"),
    "a head": (lambda h: replace(h, spec=replace(h.spec, head_std=10**400)), "sizes out of range"),
}


def with_info(hello: Hello, **changes: Any) -> Hello:
    return replace(hello, info=replace(hello.info, **changes))


@pytest.mark.parametrize("name", NO_SITE)
def test_a_site_that_cannot_be_is_refused(name: str, fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    change, reason = NO_SITE[name]
    heard: list[Event] = []

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        if node != NODE:
            return message
        return with_answer(message, Hello, change)

    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, spoil=spoil, note=heard.append)
    engine.sites.gather(3, 5)
    assert sorted(engine.sites.known) == [c for c in CLIENTS if c != VICTIM]
    assert all(reason in event.reason for event in heard if isinstance(event, Refused))
    assert [event.event for event in heard].count("refused") == 1


def with_answer(message: FlowerMessage, kind: type[Any], change: Callable[[Any], Any]) -> FlowerMessage:
    inner = unpack(message.content)
    message.content = pack(Message(inner.head, codec.encode(change(codec.decode(kind, inner.body)))))
    return message


def with_metric(name: str, value: Any, split: str = "test") -> Callable[[Evaluation], Evaluation]:
    return lambda e: replace(e, scores={**e.scores, split: {**e.scores["test"], name: value}})


def with_usage(module: str, **row: Any) -> Callable[[Evaluation], Evaluation]:
    good = {"weight": [1.0], "share": [1.0], "expert": [0]}
    return lambda e: replace(e, observed=Observed({module: ExpertUse(**{**good, **row})}, 3))


NO_SCORES: dict[str, Callable[[Evaluation], Evaluation]] = {
    "a loss that is none": with_metric("loss", float("nan")),
    "a loss without sense": with_metric("loss", 1e14),
    "an accuracy that is none": with_metric("accuracy", float("nan")),
    "a macro F1 below 0": with_metric("macro_f1", -0.1),
    "more tokens than the rows have": lambda e: replace(e, observed=Observed({}, 10**14)),
    "a weight without sense": with_usage(TARGET, weight=[1e14]),
    "a loss below 0": with_metric("loss", -1e300),
    "a loss beyond floats": with_metric("loss", 10**400),
    "more than all": with_metric("accuracy", 1.01),
    "a correlation below -1": with_metric("matthews", -1.5),
    "another metric": with_metric("speed", 1e308),
    "a metric's name": with_metric("\x1b[2J", 1.0),
    "no loss": lambda e: replace(e, scores={"test": {"accuracy": 1.0}}),
    "another split": with_metric("loss", 1.0, "train"),
    "another module": with_usage("zz"),
    "half a row": lambda e: replace(e, observed=Observed({TARGET: ExpertUse([1.0], [], [])}, 1)),
    "rows that differ": with_usage(TARGET, weight=[1.0, 0.5]),
    "no experts": with_usage(TARGET, weight=[], share=[], expert=[]),
    "half an expert": with_usage(TARGET, expert=[0.5]),
    "a share above all": with_usage(TARGET, share=[2.0]),
    "a weight that is none": with_usage(TARGET, weight=[float("inf")]),
    "tokens": lambda e: replace(e, observed=Observed({}, 10**400)),
    "embeddings": lambda e: replace(e, observed=Observed({}, 1, {Key(TARGET, 0, Part.EMBEDDING): torch.ones(2)})),
}


def test_an_evaluation_that_cannot_be_is_left_out_with_a_note(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        if node != NODE or message.metadata.message_type != "evaluate":
            return message
        turn = int(message.metadata.group_id) - 1
        changes = [*NO_SCORES.values(), lambda e: replace(e, samples=(Sample("a row", "its answer", "a text"),))]
        return with_answer(message, Evaluation, changes[turn])

    engine = flower_sites.engine_over(config, staff, spoil=spoil, note=heard.append)
    engine.sites.gather(4, 10)
    assert TARGET in {target.name for target in engine.spec.targets}
    method = flower_sites.method_of(config)
    instructions = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    for rnd, name in enumerate(NO_SCORES, start=1):
        asked = dict(engine.evaluate(method, instructions, rnd, ("validation", "test"), usage=True))
        assert sorted(asked) == [c for c in CLIENTS if c != VICTIM], name
    assert [(e.client, e.round) for e in heard if isinstance(e, Unreadable)] == [
        (VICTIM, rnd) for rnd in range(1, len(NO_SCORES) + 1)
    ]
    good = dict(engine.evaluate(method, instructions, len(NO_SCORES) + 1, ("validation", "test"), usage=True))
    assert sorted(good) == CLIENTS
    assert {tuple(evaluation.samples) for evaluation in good.values()} == {()}, "no text of a site's rows is wanted"


NO_BANKS: dict[str, tuple[Callable[[Bank], Bank], str]] = {
    "another module": (lambda b: with_tensor(b, Key("zz", 0, Part.A), torch.ones(2, 2)), "the base has no 'zz:0:A'"),
    "an embedding": (lambda b: with_tensor(b, Key(TARGET, 0, Part.EMBEDDING), torch.ones(2)), "the base has no"),
    "no B": (lambda b: replace(b, tensors={k: v for k, v in b.tensors.items() if k != BK}), "has no B of its rank"),
    "another rank": (lambda b: with_tensor(b, AK, b.tensors[AK][:1].clone()), "has no B of its rank"),
    "another side": (lambda b: with_tensor(b, AK, torch.ones(2, 3)), "has the shape"),
    "not a number": (lambda b: with_tensor(b, AK, b.tensors[AK] * math.nan), "not finite"),
    "float8": (lambda b: with_tensor(b, AK, b.tensors[AK].to(torch.float8_e4m3fn)), "not torch.float32"),
    "scaling": (lambda b: replace(b, scaling=math.inf), "its scaling"),
    "a gate": (lambda b: replace(b, gate=GateSpec("x" * 999)), "its gate has a text"),
}


def with_tensor(bank: Bank, key: Key, value: torch.Tensor) -> Bank:
    return replace(bank, tensors={**bank.tensors, key: value})


def test_a_bank_that_cannot_be_is_not_taken(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, _ = fedit
    staff = flower_sites.workers(tmp_path, CLIENTS[:2], policy={"upload_bank": True})
    config, heard = flower_sites.server_config(path), list[Event]()

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        if node != NODE or message.metadata.message_type != "query.bank":
            return message
        return with_answer(message, Bank, [*NO_BANKS.values()][int(message.metadata.group_id) - 1][0])

    engine = flower_sites.engine_over(config, staff, spoil=spoil, note=heard.append)
    engine.sites.gather(2, 10)
    method = flower_sites.method_of(config)
    instructions = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    for rnd in range(1, len(NO_BANKS) + 1):
        assert sorted(dict(engine.banks(method, instructions, rnd))) == [CLIENTS[0]]
    reasons = [event.reason for event in heard if isinstance(event, Unreadable)]
    for (name, (_, reason)), found in zip(NO_BANKS.items(), reasons, strict=True):
        assert reason in found, name


@pytest.mark.parametrize("seconds", [10**400, 1e14, -1, float("nan"), True, "1"])
def test_seconds_that_cannot_be_are_none(seconds: Any, fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[Event]()

    def spoil(node: int, message: FlowerMessage) -> FlowerMessage:
        inner = unpack(message.content)
        message.content = pack(Message({**inner.head, "seconds": seconds}, inner.body))
        return message

    some = {VICTIM: staff[VICTIM]}
    engine = flower_sites.engine_over(config, some, spoil=spoil, note=heard.append)
    engine.sites.gather(1, 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    (delivery,) = dict(engine.train(method, method.configure(state, engine.clients, 1), 1)).values()
    assert delivery.error is None
    assert [event.site_seconds for event in heard if isinstance(event, Exchanged)] == [None]


def test_a_key_speaks_for_one_site_alone(fedit: tuple[Path, dict[str, Worker]]) -> None:
    import hashlib

    path, staff = fedit
    config = flower_sites.server_config(path)
    digest = {c: hashlib.sha256(c.encode()).hexdigest() for c in CLIENTS}
    heard: list[Event] = []
    keys = {digest[c]: c for c in CLIENTS}
    engine = flower_sites.engine_over(config, staff, note=heard.append, keys=keys)
    grid = engine.sites.transport.grid  # type: ignore[attr-defined]
    shown = {"mood-0": "mood-0", "mood-1": "mood-0", "place-0": "place-0", "size-0": "size-0"}  # mood-1 with another's
    grid.keys = {11 + i: shown[c].encode() for i, c in enumerate(CLIENTS)}
    engine.sites.gather(3, 5)
    (refused,) = {event.reason for event in heard if isinstance(event, Refused)}
    assert refused == "the node calls itself mood-1, but its key belongs to mood-0"
