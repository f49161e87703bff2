"""Checkpoints: the server's state after a round, in one file that is used only if it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from coterie import codec
from coterie.files import write_atomic
from coterie.runs.ledger import Ledger, ledger_from
from coterie.types import ClientId, CoterieError, Json, Section

S = TypeVar("S")  # a method's state
_MAGIC = b"coterie checkpoint 1\n"


class CorruptCheckpointError(ValueError):
    """The file is not what :func:`save` wrote."""


@dataclass(frozen=True)
class Checkpoint(Generic[S]):
    """The state of a method after ``rnd`` rounds, and the state of the rest of the run at that time.

    ``metrics_bytes`` is the length of ``metrics.jsonl``; ``held`` has the newest round of every client's state, by
    kind of state. ``ledger``: what the run has released under ``[privacy]``.
    """

    rnd: int
    state: S
    metrics_bytes: int
    held: Mapping[str, Mapping[ClientId, int]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


def save(folder: Path, checkpoint: Checkpoint[S], keep: int, kept_rounds: Collection[int] = ()) -> Path:
    """Write the checkpoint atomically, then delete all but the newest ``keep`` and those of the rounds ``kept_rounds``.

    Raises :class:`OSError`.
    """
    info = {"rnd": checkpoint.rnd, "metrics_bytes": checkpoint.metrics_bytes, "held": checkpoint.held}
    info |= {"ledger": checkpoint.ledger.to_json()} if checkpoint.ledger.entries else {}
    body = json.dumps(info).encode() + b"\n" + codec.encode(checkpoint.state)
    path = _path(folder, checkpoint.rnd)
    write_atomic(path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    for old in _newest_first(folder)[keep:]:
        if int(old.stem) not in kept_rounds:
            old.unlink()
    return path


def load(folder: Path, rnd: int, state: type[S]) -> Checkpoint[S]:
    """The checkpoint of round ``rnd``. Raises :class:`CorruptCheckpointError` where it is gone or damaged."""
    try:
        return _read(_path(folder, rnd), state)
    except FileNotFoundError as fault:
        raise CorruptCheckpointError("there is none") from fault
    except codec.CodecError as fault:
        raise CorruptCheckpointError(str(fault)) from fault


def load_newest(
    folder: Path,
    state: type[S],
    note: Callable[[str], None],
    lacks: Callable[[Checkpoint[S]], str | None] = lambda saved: None,
) -> Checkpoint[S] | None:
    """The newest checkpoint that is whole and ``lacks`` nothing; deletes the others, and reports each through ``note``.

    None where there is no checkpoint at all. Raises :class:`CoterieError`, and deletes nothing, where no checkpoint
    can be used, and where a whole one was written by another version.
    """
    unfit: list[Path] = []
    faults: list[str] = []
    for path in _newest_first(folder):
        try:
            checkpoint = _read(path, state)
            if lacking := lacks(checkpoint):
                raise CorruptCheckpointError(lacking)
        except CorruptCheckpointError as fault:
            unfit.append(path)
            faults.append(f"{path} cannot be used ({fault})")
            note(f"{faults[-1]}; falling back to the checkpoint before it")
        except codec.CodecError as fault:
            raise CoterieError(
                f"{path} is whole, but this version cannot read it ({fault}); resume with the version that wrote it"
            ) from fault
        else:
            for path in unfit:
                path.unlink()
            return checkpoint
    if faults:
        raise CoterieError(
            f"{faults[0]}, and neither can an earlier one; restore what is missing, or start a new run with --out"
        )
    return None


def check_new(folder: Path, metrics: Path) -> None:
    """Raises :class:`CoterieError` where ``metrics`` lists rounds, but ``folder`` has no checkpoint."""
    if metrics.exists() and '"event": "round"' in metrics.read_text(encoding="utf-8", errors="replace"):
        raise CoterieError(
            f"{metrics} lists rounds, but {folder} has no checkpoint; restore one, or start a new run with --out"
        )


def _read(path: Path, state: type[S]) -> Checkpoint[S]:
    blob = path.read_bytes()
    head = len(_MAGIC) + 65
    if not blob.startswith(_MAGIC) or len(blob) < head:
        raise CorruptCheckpointError("no checkpoint header")
    body = blob[head:]
    if hashlib.sha256(body).hexdigest().encode() != blob[len(_MAGIC) : head - 1]:
        raise CorruptCheckpointError("its SHA-256 differs")
    line, _, rest = body.partition(b"\n")
    header = _header(line)
    ledger = ledger_from(header.ledger, str(path))
    return Checkpoint(header.rnd, codec.decode(state, rest), header.metrics_bytes, header.held, ledger)


class _Header(Section):
    """The header of the file, before the state."""

    rnd: int
    metrics_bytes: int
    held: Mapping[str, Mapping[ClientId, int]] = {}
    ledger: tuple[Json, ...] = ()


def _header(line: bytes) -> _Header:
    try:
        return _Header.model_validate_json(line)
    except ValidationError as fault:
        raise CorruptCheckpointError("its header is wrong") from fault


def forget_after(folder: Path, rnd: int) -> None:
    """Delete the checkpoints of rounds after ``rnd``."""
    for path in _newest_first(folder):
        if int(path.stem) > rnd:
            path.unlink()


def newest_round(folder: Path) -> int | None:
    """The round of the newest checkpoint file, None where there is none."""
    files = _newest_first(folder)
    return int(files[0].stem) if files else None


def _path(folder: Path, rnd: int) -> Path:
    return folder / f"{rnd:06d}.ckpt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), reverse=True)
