"""The worker's process: it answers over its socket, and only its own user."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coterie.deploy.worker_process import serve_forever
from coterie.flower.local_socket import hand_over
from coterie.flower.message import BrokenMessageError, Message


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    folder.chmod(0o700)
    return folder / "worker"


def answering(worker: Any, path: Path) -> threading.Thread:
    thread = threading.Thread(target=serve_forever, args=(worker, path), daemon=True)
    thread.start()
    while True:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return thread


class Echo:
    def catch_up(self) -> None:
        """Nothing is left to write."""

    def answer(self, message: Message) -> Message:
        return Message({"heard": message.head}, message.body)


def test_a_worker_answers_over_its_socket(path: Path) -> None:
    answering(Echo(), path)
    for blob in (b"", b"x" * 3_000_000):
        assert hand_over(str(path), Message({"n": 1}, blob), 20) == Message({"heard": {"n": 1}}, blob)
    with socket.socket(socket.AF_UNIX) as rude:  # hangs up in the middle
        rude.connect(str(path))
        rude.sendall(b"\x01\x02")
    assert hand_over(str(path), Message({"n": 2}), 20).head == {"heard": {"n": 2}}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_is_turned_away(path: Path) -> None:
    heard: list[Message] = []

    class Listens(Echo):
        def answer(self, message: Message) -> Message:
            heard.append(message)
            return super().answer(message)

    answering(Listens(), path)
    path.parent.chmod(0o711)
    path.parent.parent.chmod(0o711)
    path.chmod(0o666)  # as if both modes had been lost
    child = os.fork()
    if child == 0:
        code = 0
        try:
            os.setuid(65534)
            hand_over(str(path), Message({"n": 1}), 5)
        except (OSError, BrokenMessageError):
            code = 7
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert heard == []
