"""The local socket: closed to other users, and a message that is cut short is an error."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from coterie.flower.local_socket import listening, receive, send
from coterie.flower.message import BrokenMessageError, Message


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    folder.chmod(0o700)
    return folder / "worker"


def test_only_its_user_can_open_the_socket(path: Path) -> None:
    with listening(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="others can enter"):
        listening(path)


def test_half_a_message_is_an_error() -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, Message({"a": 1}, b"blob"))
        assert receive(other) == Message({"a": 1}, b"blob")
        one.sendall(b"\xff" * 12)
        with pytest.raises(BrokenMessageError, match="its head has"):
            receive(other)
