"""The engine of a real federation, over Flower's messages in process: bad answers, late ones, missing ones, resume."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Error, Message, RecordDict

import flower_sites
import sites
from coterie import codec
from coterie.engines.flower import GridTransport, InProcessGrid, _LocalOnly, pack, unpack
from coterie.engines.parcel import BrokenParcelError, Parcel
from coterie.engines.remote import Hello, RemoteEngine
from coterie.federation.worker import Worker
from coterie.runner import Rounds, Runner
from coterie.types import CoterieError
from spoiled import SPOILED

CLIENTS = ["mood-0", "mood-1", "place-0", "size-0"]
VICTIM, NODE = "mood-1", 12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fedit(tmp_path: Path) -> tuple[Path, dict[str, Worker]]:
    path = sites.config(tmp_path, method="fedit")
    return path, flower_sites.workers(tmp_path, CLIENTS)


def run(engine: RemoteEngine, config: Any, folder: Path, **rounds: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return Runner(flower_sites.method_of(config), engine, Rounds(**{"rounds": 3, "seed": 0, **rounds}), folder).run()


def rounds_in(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "round"]


def spoiled(change: Callable[[Parcel], Parcel]) -> Callable[[Message], Message]:
    """The change of a parcel as one of the message that holds it."""

    def spoil(message: Message) -> Message:
        message.content = pack(change(unpack(message.content)))
        return message

    return spoil


def flower_error(message: Message, text: str) -> Message:
    made = Message(Error(8, text), reply_to=message)
    made.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    return made


def unreadable(message: Message) -> Message:
    message.content = RecordDict({"head": ConfigRecord({"json": "{}"})})
    return message


BAD: dict[str, tuple[Callable[[Message], Message], str]] = {
    **{name: (spoiled(change), reason) for name, (change, reason) in SPOILED.items()},
    "no parcel": (unreadable, "does not hold a head and a blob"),
    "Flower's error": (lambda m: flower_error(m, "killed\nat line"), "Flower says 8: killed"),
}


def test_a_bad_answer_is_left_out_with_the_reason_and_the_round_goes_on(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)

    def spoil(node: int, message: Message) -> Message:
        """In round i the victim's answer is bad in the i-th way; a message's group is its round."""
        if node != NODE or message.metadata.message_type != "train":
            return message
        return [*BAD.values()][int(message.metadata.group_id) - 1][0](message)

    engine = flower_sites.engine_over(config, staff, sites=tuple(CLIENTS), spoil=spoil)
    engine.gather(0, 10)
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

    def spoil(node: int, message: Message) -> Message | None:
        if message.metadata.message_type in ("train", "evaluate") and draw.random() < 0.3:
            lost.append(message.metadata.message_type)
            return None
        return message

    engine = flower_sites.engine_over(config, staff, spoil=spoil)
    engine.gather(len(CLIENTS), 10)
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
    config, heard = flower_sites.server_config(path), list[dict[str, Any]]()
    grid = SlowGrid({11 + i: staff[c].answer for i, c in enumerate(CLIENTS)})
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.transport = GridTransport(grid)
    engine.gather(len(CLIENTS), 10)
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    one = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert "no reply within 30 s" in str(one[VICTIM].error)
    assert sum(delivery.error is None for delivery in one.values()) == 3
    grid.held = False
    two = dict(engine.train(method, method.configure(state, engine.clients, 2), 2))
    assert [d.error for d in two.values()] == [None] * 4
    (late,) = [event for event in heard if event["event"] == "late"]
    assert (late["client"], late["round"]) == (VICTIM, 1)


def test_a_site_that_leaves_is_missed_and_comes_back_as_another_node(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[dict[str, Any]]()
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.gather(len(CLIENTS), 10)
    grid = engine.transport.grid  # type: ignore[attr-defined]
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    answer = grid.sites.pop(NODE)
    gone = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert gone[VICTIM].error == "the site is not connected"
    assert engine.clock() < 30  # it was waited for, and not for the whole round
    at = engine.clock()
    dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert engine.clock() == at  # and not a second time
    grid.sites[99] = answer
    back = dict(engine.train(method, method.configure(state, engine.clients, 2), 2))
    assert back[VICTIM].error is None
    assert [e["node"] for e in heard if e["event"] == "back"] == ["99"]


def test_a_site_that_is_back_as_another_node_is_sent_its_message_at_once(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, heard = flower_sites.server_config(path), list[dict[str, Any]]()
    grid = SlowGrid({11 + i: staff[c].answer for i, c in enumerate(CLIENTS)})
    engine = flower_sites.engine_over(config, staff, note=heard.append)
    engine.transport = GridTransport(grid)
    engine.gather(len(CLIENTS), 10)
    slept = engine.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.clock() > 5:  # started again; Flower takes the old node for alive
            grid.sites.setdefault(99, staff[VICTIM].answer)

    engine.sleep = sleep
    method = flower_sites.method_of(config)
    state = method.init(engine.spec, engine.clients)
    one = dict(engine.train(method, method.configure(state, engine.clients, 1), 1))
    assert one[VICTIM].error is None
    assert 5 < engine.clock() < 10
    assert [e["node"] for e in heard if e["event"] == "back"] == ["99"]


def test_a_site_that_comes_back_in_time_is_sent_its_message_again(
    fedit: tuple[Path, dict[str, Worker]], tmp_path: Path
) -> None:
    path, staff = fedit
    config, calls = flower_sites.server_config(path), 0

    def spoil(node: int, message: Message) -> Message:
        nonlocal calls
        calls += node == NODE and message.metadata.message_type == "train"
        bad = node == NODE and message.metadata.message_type == "train" and calls < 3
        return flower_error(message, "the node is gone") if bad else message

    engine = flower_sites.engine_over(config, staff, spoil=spoil, greeting=20.0)
    engine.gather(len(CLIENTS), 10)
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
    whole.gather(4, 10)
    state = run(whole, config, tmp_path / "whole-run")

    class DiedError(Exception): ...

    def dies(node: int, message: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.metadata.group_id == "2":
            raise DiedError
        return message

    staff = flower_sites.workers(tmp_path, CLIENTS)
    engine = flower_sites.engine_over(config, staff, spoil=dies)
    engine.gather(4, 10)
    with pytest.raises(DiedError):
        run(engine, config, tmp_path / "run")
    assert all((w.state / "run" / "personal" / c / "000002.safetensors").exists() for c, w in staff.items())
    again = flower_sites.engine_over(config, staff, attempt=2)
    again.gather(4, 10)
    assert codec.encode(run(again, config, tmp_path / "run")) == codec.encode(state)
    for client, worker in staff.items():
        mine, others = (w.state / "run" / "personal" / client for w in (worker, whole_staff[client]))
        assert [p.read_bytes() for p in sorted(mine.iterdir())] == [p.read_bytes() for p in sorted(others.iterdir())]
    method = flower_sites.method_of(config)
    stale = dict(engine.train(method, method.configure(state, engine.clients, 4), 4))
    assert {d.error for d in stale.values()} == {"the message is of attempt 1, and attempt 2 has begun"}


@pytest.mark.parametrize("name", ["fedlease", "fedit"])
def test_a_site_may_join_and_another_leave_between_two_starts(name: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, method=name)
    staff = flower_sites.workers(tmp_path, CLIENTS)
    config = flower_sites.server_config(path)
    some = {c: staff[c] for c in CLIENTS[:3]}
    engine = flower_sites.engine_over(config, some, sites=tuple(some))
    engine.gather(0, 10)
    run(engine, config, tmp_path / "run", rounds=2)
    others = {c: staff[c] for c in CLIENTS[1:]}
    again = flower_sites.engine_over(config, others, attempt=2, sites=tuple(others))
    again.known.update(engine.known)
    again.gather(0, 10)
    run(again, config, tmp_path / "run", rounds=5)
    assert [(sorted(e["clients"]), e["failed"]) for e in rounds_in(tmp_path / "run")] == [
        *[(CLIENTS[:3], {})] * 2,
        *[(CLIENTS[1:], {})] * 3,
    ]


def test_rows_that_changed_are_refused(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, staff = fedit
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff)
    engine.gather(4, 10)
    info = replace(engine.known[VICTIM].info, num_train=99)
    heard: list[dict[str, Any]] = []
    again = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append)
    again.known.update({**engine.known, VICTIM: replace(engine.known[VICTIM], info=info)})
    again.gather(3, 10)
    assert ["not those that it began with" in e["reason"] for e in heard if e["event"] == "refused"] == [True]


def test_a_site_with_the_wrong_base_comes_back_with_the_right_one(fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    heard: list[dict[str, Any]] = []
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, note=heard.append, sites=tuple(CLIENTS))
    grid = engine.transport.grid  # type: ignore[attr-defined]
    right = grid.sites[11]

    def wrong(parcel: Parcel) -> Parcel:
        made = right(parcel)
        return Parcel(made.head, codec.encode(replace(codec.decode(Hello, made.blob), base="another")))

    grid.sites[11], slept = wrong, engine.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.clock() > 5 and 11 in grid.sites:  # its people mend it, and start it again
            del grid.sites[11]
            grid.sites[99] = right

    engine.sleep = sleep
    engine.gather(0, 60)
    assert sorted(engine.known) == CLIENTS
    assert len({hello.base for hello in engine.known.values()}) == 1
    assert all("not another as mood-0); give both" in e["reason"] for e in heard if e["event"] == "refused")


def test_who_said_hello_and_left_before_the_start_is_no_client(fedit: tuple[Path, dict[str, Worker]]) -> None:
    path, staff = fedit
    engine = flower_sites.engine_over(flower_sites.server_config(path), staff, sites=(*CLIENTS, "someone"))
    grid, slept = engine.transport.grid, engine.sleep  # type: ignore[attr-defined]

    def sleep(seconds: float) -> None:
        slept(seconds)
        if engine.clock() > 5:
            grid.sites.pop(NODE, None)

    engine.sleep = sleep
    engine.gather(3, 10)
    assert [c.id for c in engine.clients] == ["mood-0", "place-0", "size-0"]


def test_who_does_not_fit_is_refused(fedit: tuple[Path, dict[str, Worker]], tmp_path: Path) -> None:
    path, staff = fedit
    config = flower_sites.server_config(path)

    def reasons(**deal: Any) -> set[str]:
        heard: list[dict[str, Any]] = []
        engine = flower_sites.engine_over(config, staff, note=heard.append, **deal)
        with pytest.raises(CoterieError, match=r"sites are there after 20 s; missing"):
            engine.gather(4, 20)
        return {event["reason"] for event in heard if event["event"] == "refused"}

    assert reasons(sites=("mood-0", "mood-1", "place-0", "someone")) == {"size-0 is not among [federation] sites"}
    assert len(reasons(base="abc", sites=tuple(CLIENTS))) == 4
    assert any("key is unknown's" in r for r in reasons(keys={"digest": "mood-0"}))
    staff[VICTIM] = flower_sites.workers(tmp_path, [VICTIM], policy={"methods": ["fedlease"]})[VICTIM]
    assert reasons() == {"this site does not run fedit, only fedlease ([policy] methods)"}


def test_a_key_speaks_for_one_site_alone(fedit: tuple[Path, dict[str, Worker]]) -> None:
    import hashlib

    path, staff = fedit
    config = flower_sites.server_config(path)
    digest = {c: hashlib.sha256(c.encode()).hexdigest() for c in CLIENTS}
    heard: list[dict[str, Any]] = []
    keys = {digest[c]: c for c in CLIENTS}
    engine = flower_sites.engine_over(config, staff, note=heard.append, keys=keys)
    grid = engine.transport.grid  # type: ignore[attr-defined]
    shown = {"mood-0": "mood-0", "mood-1": "mood-0", "place-0": "place-0", "size-0": "size-0"}  # mood-1 with another's
    grid.keys = {11 + i: shown[c].encode() for i, c in enumerate(CLIENTS)}
    engine.gather(3, 5)
    (refused,) = {event["reason"] for event in heard if event["event"] == "refused"}
    assert refused == "the node says that it is mood-1, and its key is mood-0's"


def test_a_parcel_survives_a_message_and_nothing_else_is_one() -> None:
    parcel = Parcel({"a": [1, None, "é"]}, bytes(range(256)))
    assert unpack(pack(parcel)) == parcel
    assert unpack(pack(Parcel())) == Parcel()
    for head in ("[1]", "{", "1", ""):
        content = pack(Parcel({}, b"x"))
        content["head"] = ConfigRecord({"json": head})
        with pytest.raises(BrokenParcelError):
            unpack(content)
    with pytest.raises(BrokenParcelError):
        unpack(RecordDict())


def test_the_superlink_answers_other_machines_for_sites_alone() -> None:
    async def passes(host: str, path: str) -> bool:
        seen: list[Any] = []

        async def app(scope: Any, get: Any, put: Any) -> None:
            seen.append("passed")

        async def put(message: Any) -> None:
            seen.append(message.get("status"))

        await _LocalOnly(app)({"type": "http", "path": path, "client": (host, 1)}, None, put)
        return seen == ["passed"]

    for path, remote in (
        ("/v1/fleet/pull-messages", True),
        ("/health", True),
        ("/v1/control/start-run", False),
        ("/v1/runtime/pull-task-input", False),
        ("/docs", False),
        ("/v1/fleetx", False),
    ):
        assert asyncio.run(passes("127.0.0.1", path))
        assert asyncio.run(passes("10.1.2.3", path)) == remote
