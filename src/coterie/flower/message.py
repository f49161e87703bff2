"""What travels between a server and a site: a head in JSON and a blob of the codec. And how a local socket carries it.

Imports nothing heavy: the process that Flower starts for every message is up in a moment.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

KINDS = ("query.hello", "train", "evaluate", "query.bank")
_SIZES = struct.Struct("<IQ")  # bytes of the head, bytes of the blob
_HEAD_BOUND = 2**26
_PIECE = 2**20


@dataclass(frozen=True)
class Parcel:
    """``head``: JSON, small; ``blob``: what :mod:`coterie.codec` wrote, or nothing."""

    head: dict[str, Any] = field(default_factory=dict)
    blob: bytes = b""


class Transport(Protocol):
    """Carries parcels to nodes and back; see :class:`coterie.flower.app.GridTransport`."""

    @property
    def pause(self) -> float: ...

    def nodes(self) -> Mapping[int, str]: ...

    def send(self, to: Sequence[tuple[int, str, Parcel]], ttl: float, group: str) -> list[str | None]: ...

    def receive(self, tickets: Collection[str]) -> list[tuple[str, Parcel | str]]: ...


class BrokenParcelError(ValueError):
    """What came is no parcel."""


class GoneError(ConnectionError):
    """The other side had all of the parcel, and went away before it answered."""


def head_of(text: str) -> dict[str, Any]:
    """The head that ``text`` is the JSON of. Raises :class:`BrokenParcelError`."""
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise BrokenParcelError("its head is no JSON") from fault
    if not isinstance(head, dict):
        raise BrokenParcelError("its head is no JSON object")
    return head


def send(to: socket.socket, parcel: Parcel) -> None:
    """Write ``parcel`` to a connected socket. Raises :class:`OSError`."""
    head = json.dumps(parcel.head).encode()
    to.sendall(_SIZES.pack(len(head), len(parcel.blob)) + head)
    if parcel.blob:  # the answer to an empty one may come before this, and the other side be gone
        to.sendall(parcel.blob)


def receive(of: socket.socket) -> Parcel:
    """Read one parcel. Raises :class:`BrokenParcelError`; :class:`ConnectionError` where the other side went away."""
    head_size, blob_size = _SIZES.unpack(_read(of, _SIZES.size))
    if head_size > _HEAD_BOUND:
        raise BrokenParcelError(f"its head would have {head_size} bytes")
    return Parcel(head_of(_read(of, head_size).decode("utf-8", "replace")), _read(of, blob_size))


def _read(of: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        part = of.recv(min(left, _PIECE))
        if not part:
            raise ConnectionResetError("the other side closed the connection")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def listening(path: Path) -> socket.socket:
    """A socket that listens at ``path``, which only its user can open. Its folder must be that user's alone."""
    folder = path.parent.stat()
    if folder.st_mode & 0o077 or folder.st_uid != os.getuid():
        raise PermissionError(13, "others may enter the folder of the socket", str(path.parent))
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    old = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(old)
    made.listen(16)
    return made


def user_of(peer: socket.socket) -> int:
    """The user id of the process at the other end (Linux). Raises :class:`OSError`."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def hand_over(path: str, parcel: Parcel, seconds: float) -> Parcel:
    """Hand ``parcel`` to the worker that listens at ``path`` and return its answer.

    Raises :class:`OSError` (:class:`TimeoutError` after ``seconds``, :class:`GoneError` where the worker died of it)
    and :class:`BrokenParcelError`.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(seconds)
        link.connect(path)
        if user_of(link) != os.getuid():
            raise PermissionError(13, "another user listens there", path)
        send(link, parcel)
        try:
            return receive(link)
        except ConnectionError as fault:
            raise GoneError(*fault.args) from fault
