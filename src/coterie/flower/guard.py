"""Limits the size of a reply while Flower pulls it: a node may send anything.

A message of ours is a handful of objects: one array, its chunks, and a few small ones that name each other. Flower puts
together whatever objects say; an array that names one chunk a million times would fill the memory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.serverapp import Grid

MAX_HEAD = 2**20  # bytes of a reply's head, and of every object that is not a chunk of the array
_CHUNK = int(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
_OVERHEAD = 2**12  # bytes of an object beside its content
_KINDS = 5  # of the small objects of a message


class TooLargeError(ValueError):
    """A reply is larger than it may be."""


class PullGuard:
    """Checks the objects of one reply, whose body may have ``limit`` bytes. Several threads pull them."""

    def __init__(self, limit: int) -> None:
        self.limit, self._left = limit, limit + (_KINDS + limit // _CHUNK) * _OVERHEAD + _KINDS * MAX_HEAD
        self._kinds: set[bytes] = set()
        self._lock = threading.Lock()

    def check(self, content: bytes) -> None:
        """Raises :class:`TooLargeError` for an object that no reply within the limit has."""
        kind = content[:20].partition(b" ")[0]
        with self._lock:
            self._left -= len(content)
            twice = kind in self._kinds and kind != b"ArrayChunk"
            self._kinds.add(kind)
        largest = (_CHUNK if kind == b"ArrayChunk" else MAX_HEAD) + _OVERHEAD
        if twice or self._left < 0 or len(content) > largest or (kind == b"Array" and self._repeats(content)):
            raise TooLargeError(f"it is larger than the {self.limit} bytes allowed")

    def _repeats(self, content: bytes) -> bool:
        """Whether an array names more chunks than the limit has."""
        chunks = json.loads(content.partition(b"\0")[2])["arraychunk_ids"]
        return len(chunks) > self.limit // _CHUNK + 1


@contextmanager
def at_most(grid: Grid, limit: int) -> Iterator[None]:
    """Within a ``with`` block ``grid`` pulls only replies whose body has at most ``limit`` bytes.

    It raises :class:`TooLargeError` for others. A Grid that pulls no objects (a simulation's) is left as it is.
    """
    client: Any = getattr(grid, "_runtime_client", None)
    if client is None:
        yield
        return
    guard, pull = PullGuard(limit), client.PullObject

    def pull_object(request: object) -> object:
        response = pull(request)
        if response.object_content:  # else it has not arrived yet
            guard.check(response.object_content)
        return response

    client.PullObject = pull_object
    try:
        yield
    finally:
        client.PullObject = pull
