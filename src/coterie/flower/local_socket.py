"""How a message crosses a local socket: from the ClientApp, a new process for every message, to the site's worker."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

from coterie.flower.message import BrokenMessageError, Message, head_of

_SIZES = struct.Struct("<IQ")  # bytes of the head, bytes of the body
_MAX_HEAD = 2**26  # bytes
_CHUNK = 2**20  # bytes


class WorkerDiedError(ConnectionError):
    """The worker received the whole message, but went away before it answered."""


def send(link: socket.socket, message: Message) -> None:
    """Write ``message`` to a connected socket. Raises :class:`OSError`."""
    head = json.dumps(message.head).encode()
    link.sendall(_SIZES.pack(len(head), len(message.body)) + head)
    if message.body:  # an empty message may be answered before this, and the other side gone
        link.sendall(message.body)


def receive(link: socket.socket) -> Message:
    """Read one message. Raises :class:`BrokenMessageError`; :class:`ConnectionError` if the other side went away."""
    head_size, body_size = _SIZES.unpack(_read(link, _SIZES.size))
    if head_size > _MAX_HEAD:
        raise BrokenMessageError(f"its head has {head_size} bytes; the limit is {_MAX_HEAD}")
    return Message(head_of(_read(link, head_size).decode("utf-8", "replace")), _read(link, body_size))


def _read(link: socket.socket, size: int) -> bytes:
    chunks, left = [], size
    while left:
        chunk = link.recv(min(left, _CHUNK))
        if not chunk:
            raise ConnectionResetError("the other side closed the connection")
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def listening(path: Path) -> socket.socket:
    """A socket that listens at ``path`` and that only its user can open. Its folder must be that user's alone.

    Raises :class:`PermissionError`.
    """
    folder = path.parent.stat()
    if folder.st_mode & 0o077 or folder.st_uid != os.getuid():
        raise PermissionError(13, "others can enter the folder of the socket", str(path.parent))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(umask)
    listener.listen(16)
    return listener


def user_of(peer: socket.socket) -> int:
    """The user id of the process at the other end (Linux). Raises :class:`OSError`."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def hand_over(path: str, message: Message, seconds: float) -> Message:
    """Hand ``message`` to the worker that listens at ``path`` and return its answer.

    Raises :class:`OSError` (:class:`TimeoutError` after ``seconds``, :class:`WorkerDiedError` if the worker went away
    with the message) and :class:`BrokenMessageError`.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(seconds)
        link.connect(path)
        if user_of(link) != os.getuid():
            raise PermissionError(13, "another user listens there", path)
        send(link, message)
        try:
            return receive(link)
        except ConnectionError as fault:
            raise WorkerDiedError(*fault.args) from fault
