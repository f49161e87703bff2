"""Checkpoints: the server's state after a round, in one file that is whole or is not used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie import codec
from coterie.files import write_atomic
from coterie.types import Json

_MAGIC = b"coterie checkpoint 1\n"


class CorruptCheckpointError(ValueError):
    """The file is not what :func:`save` wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a method after ``rnd`` rounds, and what the run keeps beside it (JSON)."""

    rnd: int
    state: Any
    info: dict[str, Json]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint atomically, then delete all but the newest ``keep``. Raises :class:`OSError`."""
    info = json.dumps({"rnd": checkpoint.rnd, **checkpoint.info}).encode() + b"\n"
    body = info + codec.encode(checkpoint.state)
    path = folder / f"{checkpoint.rnd:06d}.ckpt"
    write_atomic(path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load_newest(folder: Path, state: type[Any], note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; says in ``note`` which ones are not. None where there is none."""
    for path in _newest_first(folder):
        try:
            return _read(path, state)
        except (CorruptCheckpointError, codec.CodecError) as fault:
            note(f"{path} is corrupt ({fault}); falling back to the checkpoint before it")
    return None


def _read(path: Path, state: type[Any]) -> Checkpoint:
    blob = path.read_bytes()
    head = len(_MAGIC) + 65
    if not blob.startswith(_MAGIC) or len(blob) < head:
        raise CorruptCheckpointError("no checkpoint header")
    body = blob[head:]
    if hashlib.sha256(body).hexdigest().encode() != blob[len(_MAGIC) : head - 1]:
        raise CorruptCheckpointError("its SHA-256 differs")
    line, _, rest = body.partition(b"\n")
    info = json.loads(line)
    return Checkpoint(info.pop("rnd"), codec.decode(state, rest), info)


def newest_round(folder: Path) -> int:
    """The round of the newest checkpoint file."""
    return int(_newest_first(folder)[0].stem)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), reverse=True)
