"""One client's round from bytes to bytes: how often they are encoded and decoded, and what a guard keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import coterie.adapters.bundle  # noqa: F401  (imported late otherwise, while calls are counted)
import flower_sites
import sites
from coterie import codec
from coterie.config.load import load_config
from coterie.data.clients import load_data
from coterie.engines import actor, flower_sim, local
from coterie.engines.client import Guard, LocalClient, Outcome, client_bank, evaluate_client, train_client
from coterie.flower.message import Message
from coterie.types import Bank, CoterieError, Instruction, Reply

CLIENTS = ["mood-0", "place-0"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Counts the codec's calls by what they do and the type that they do it to."""
    calls: Counter[tuple[str, str]] = Counter()
    encode, decode = codec.encode, codec.decode

    def counting_encode(value: Any) -> bytes:
        calls["encode", type(value).__name__] += 1
        return encode(value)

    def counting_decode(kind: Any, blob: bytes) -> Any:
        calls["decode", kind.__name__] += 1
        return decode(kind, blob)

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", counting_encode)
        patch.setattr(codec, "decode", counting_decode)
        yield calls


def once_each(clients: int, reply: str) -> dict[tuple[str, str], int]:
    """One instruction that all clients are sent is encoded once, and decoded once by each."""
    return {
        ("encode", "Instruction"): 1,
        ("decode", "Instruction"): clients,
        ("encode", reply): clients,
        ("decode", reply): clients,
    }


def test_over_flower_everything_is_encoded_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sites.config(tmp_path, method="fedit")
    staff = flower_sites.workers(tmp_path, CLIENTS, policy={"upload_bank": True})
    config = flower_sites.server_config(path)
    engine = flower_sites.engine_over(config, staff, sites=tuple(CLIENTS))
    engine.sites.gather(0, 10)
    method = flower_sites.method_of(config)
    instructions = method.configure(method.init(engine.spec, engine.clients), engine.clients, 1)
    states = ("encode", "Personal"), ("decode", "Personal")

    with counted(monkeypatch) as calls:
        deliveries = dict(engine.train(method, instructions, 1))
    assert [d.error for d in deliveries.values()] == [None, None]
    assert {call: n for call, n in calls.items() if call not in states} == once_each(2, "Reply")
    with counted(monkeypatch) as calls:
        assert len(dict(engine.evaluate(method, instructions, 1, ("test",), usage=True))) == 2
    assert {call: n for call, n in calls.items() if call not in states} == once_each(2, "Evaluation")
    with counted(monkeypatch) as calls:
        assert len(dict(engine.banks(method, instructions, 1))) == 2
    assert {call: n for call, n in calls.items() if call not in states} == once_each(2, "Bank")


def test_an_actor_decodes_and_encodes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(sites.config(tmp_path, method="fedit"))
    federation = load_data(config.data, config.task.kind, config.run.seed, tmp_path)
    engine = local.make(config, federation, tmp_path / "run", tmp_path, actor._BASES)
    method = config.make_method(Path())
    first = engine.clients[0]
    blob = codec.encode(method.configure(method.init(engine.spec, engine.clients), [first], 1)[first.id])
    head = flower_sim.head_of(config, federation, tmp_path / "run", tmp_path) | {"client": first.id, "round": 1}
    asks: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "train": (Reply, {}),
        "evaluate": (local.Evaluation, {"splits": ["test"], "usage": True}),
        "query.bank": (Bank, {}),
    }
    for kind, (answer, more) in asks.items():
        with counted(monkeypatch) as calls:
            found = actor.answer(Message(head | {"kind": kind} | more, blob))
        assert "fault" not in found.head
        calls = Counter({call: n for call, n in calls.items() if call[1] != "Personal"})
        assert calls == {("decode", "Instruction"): 1, ("encode", answer.__name__): 1}
        codec.decode(answer, found.body)


# what a client insists on --------------------------------------------------------------------------------------------


def a_client(folder: Path) -> tuple[LocalClient, Any, bytes]:
    """A client of the local engine, its method, and the bytes of its first instruction."""
    config = load_config(sites.config(folder, method="fedit"))
    federation = load_data(config.data, config.task.kind, config.run.seed, folder)
    engine = local.make(config, federation, folder / "run", folder, {})
    method = config.make_method(Path())
    first = engine.clients[0]
    ins = method.configure(method.init(engine.spec, engine.clients), [first], 1)[first.id]
    return LocalClient(engine.workplace, federation.clients[0], engine.states), method, codec.encode(ins)


def test_a_refused_reply_leaves_no_state_and_says_why_in_the_guards_words(tmp_path: Path) -> None:
    client, method, blob = a_client(tmp_path)

    def refuse(reply: Reply) -> Reply:
        raise CoterieError("a secret")

    guard = Guard(release=refuse, wording=lambda fault: str(fault).replace("a secret", "kept here"))
    outcome = train_client(replace(client, guard=guard), method, blob, 1)
    assert (outcome.blob, outcome.error) == (b"", "kept here")
    assert client.states.personal.load(client.id, 1) is None
    assert train_client(client, method, blob, 1).error is None
    assert client.states.personal.load(client.id, 1) is not None


def test_what_is_released_is_what_leaves(tmp_path: Path) -> None:
    client, method, blob = a_client(tmp_path)
    guard = Guard(release=lambda reply: replace(reply, info={}))
    whole, less = (train_client(replace(client, guard=g), method, blob, 1) for g in (Guard(), guard))
    assert isinstance(whole, Outcome)
    replies = [codec.decode(Reply, outcome.blob) for outcome in (whole, less)]
    assert "loss" in replies[0].info
    assert replies[1].info == {}
    assert codec.encode(replace(replies[0], info={})) == less.blob


def test_an_instruction_that_is_refused_reaches_nothing(tmp_path: Path) -> None:
    client, method, blob = a_client(tmp_path)
    seen: list[Instruction] = []

    def admit(ins: Instruction) -> None:
        seen.append(ins)
        raise CoterieError("too large")

    guarded = replace(client, guard=Guard(admit=admit))
    for asked in (
        lambda: train_client(guarded, method, blob, 1),
        lambda: evaluate_client(guarded, method, blob, 1, ("test",)),
        lambda: client_bank(guarded, method, blob, 1),
    ):
        with pytest.raises(CoterieError, match="too large"):
            asked()
    assert len(seen) == 3
    assert client.states.personal.load(client.id, 1) is None
    with pytest.raises(codec.CodecError):
        train_client(client, method, json.dumps({}).encode(), 1)
