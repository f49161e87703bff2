"""Nodes that a SuperLink refuses because of their key: noted by the SuperLink's process, read by ``coterie serve``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FILE = "refused.jsonl"
_MOST = 1000  # distinct refusals that a SuperLink notes: anybody can make new keys


@dataclass(frozen=True)
class RefusedKey:
    """A node's key, by its SHA-256; ``known``: it is registered, so another node uses it."""

    key: str
    known: bool


class RefusedKeys:
    """The refusals of a SuperLink whose files are in ``home``, each once."""

    def __init__(self, home: Path) -> None:
        self.path = home / _FILE
        self._seen: set[RefusedKey] = set()
        self._at = 0

    def add(self, refused: RefusedKey) -> None:
        """Note one more."""
        if refused in self._seen or len(self._seen) >= _MOST:
            return
        self._seen.add(refused)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([refused.key, refused.known]) + "\n")

    def new(self) -> Iterator[RefusedKey]:
        """Those that were noted since the last call, by any process."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                refused = RefusedKey(*json.loads(line))
                if refused not in self._seen:
                    self._seen.add(refused)
                    yield refused
