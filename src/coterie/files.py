"""Files that exist in full or not at all."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from coterie.text import parse_json
from coterie.types import CoterieError, Json

T = TypeVar("T")
_FIX = "restore it, or start a new run with --out"


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` to ``path`` so that a crash at any moment leaves the old file or the new one, never a part.

    ``mode``: who may read and write the file, less what the process's umask takes away.

    Raises :class:`OSError`, with the old file untouched and no temporary file left behind, when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Delete the temporary files that killed processes left below ``folder`` in :func:`write_atomic`."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def write_json(path: Path, value: Json) -> None:
    """:func:`write_atomic` of ``value`` as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, fix: str = _FIX) -> Json:
    """What :func:`write_json` wrote. Raises :class:`CoterieError` for a damaged file, with the ``fix``."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as fault:  # JSON or UTF-8
        raise CoterieError(f"{path} is damaged ({fault}); {fix}") from fault


def read_json_as(path: Path, kind: TypeAdapter[T], fix: str = _FIX) -> T:
    """:func:`read_json` of a ``kind`` of value. Raises :class:`CoterieError` for any other, too."""
    try:
        return kind.validate_python(read_json(path, fix))
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CoterieError(f"{path} is damaged ({where + ': ' if where else ''}{first['msg']}); {fix}") from fault


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
