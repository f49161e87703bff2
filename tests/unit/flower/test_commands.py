"""Flower's programs with our changes: what the SuperLink refuses, how often a SuperNode looks for messages."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from coterie.flower import commands
from coterie.flower.commands import LocalOnly


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
