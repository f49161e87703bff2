"""Flower's programs with our changes: what the SuperLink refuses, how often a SuperNode looks for messages."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coterie.flower import commands
from coterie.flower.commands import LocalOnly
from coterie.flower.refused import RefusedKey, RefusedKeys


def test_the_superlink_answers_other_machines_for_sites_alone() -> None:
    async def passes(host: str, path: str) -> bool:
        seen: list[Any] = []

        async def app(scope: Any, get: Any, put: Any) -> None:
            seen.append("passed")

        async def put(message: Any) -> None:
            seen.append(message.get("status"))

        await LocalOnly(app)({"type": "http", "path": path, "client": (host, 1)}, None, put)
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


def test_a_supernode_looks_sooner_for_a_while_after_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import cli, start_client_internal

    found, slept, now = iter([None, 7, None, None, None]), list[float](), [1000.0]
    assert start_client_internal.time is time  # type: ignore[attr-defined]

    def supernode() -> None:
        """Flower's loop: after a message it works until its answer is sent, and looks again at once."""
        for passed in (0.0, 0.0, 300.0, 100.0, 30.0):
            now[0] += passed
            if start_client_internal._pull_and_store_message() is None:  # type: ignore[call-arg]
                start_client_internal.time.sleep(3)  # type: ignore[attr-defined]
        start_client_internal.time.sleep(0.1)  # type: ignore[attr-defined]

    monkeypatch.setattr(cli, "flower_supernode", supernode)
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", lambda: next(found))
    monkeypatch.setattr(start_client_internal, "time", time)
    monkeypatch.setattr(commands, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append))
    commands.supernode_command()
    assert slept == [3, 0.5, 0.5, 3, 0.1]


def test_a_supernode_that_is_another_one_inside_keeps_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import cli, start_client_internal

    ran = []
    monkeypatch.setattr(cli, "flower_supernode", lambda: ran.append(start_client_internal.time))  # type: ignore[attr-defined]
    monkeypatch.delattr(start_client_internal, "_pull_and_store_message")
    commands.supernode_command()
    assert ran == [time]


def test_a_superlink_notes_whom_it_refuses_for_its_key_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own state and handlers: a key that is not registered, and one that another node uses."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.supercore.error import FlowerError
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.servicer.fleet import fleet_handlers

    monkeypatch.setattr(fleet_handlers, "activate_node", fleet_handlers.activate_node)
    commands._note_refused_keys(RefusedKeys(tmp_path))
    reader = RefusedKeys(tmp_path)
    assert list(reader.new()) == []
    state = InMemoryLinkState(cast(Any, SimpleNamespace()), ObjectStoreFactory().store())
    state.create_node("id", "name", b"ours", 0)

    def activate(key: bytes) -> None:
        fleet_handlers.activate_node(ActivateNodeRequest(public_key=key, heartbeat_interval=30), state)

    activate(b"ours")
    for _ in range(3):
        for key in (b"ours", b"a stranger's"):
            with pytest.raises(FlowerError):
                activate(key)
    digests = [hashlib.sha256(key).hexdigest() for key in (b"ours", b"a stranger's")]
    assert list(reader.new()) == [RefusedKey(digests[0], True), RefusedKey(digests[1], False)]
    assert list(reader.new()) == []
