"""Files in a run's folder with what a comparison measures after the run; they name the summary that they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from coterie.files import read_json
from coterie.runs.summary import SUMMARY
from coterie.types import CoterieError


class Afterwards(Protocol):
    """Something measured after a run. ``summary`` is the SHA-256 of the run's ``summary.json``: a run that was given
    more rounds has another."""

    @property
    def summary(self) -> str: ...


A = TypeVar("A", bound=Afterwards)


def digest(folder: Path) -> str:
    """What the run in ``folder`` is known by."""
    return hashlib.sha256((folder / SUMMARY).read_bytes()).hexdigest()


def read_kept(path: Path, of: TypeAdapter[A], again: str) -> A | None:
    """What is kept in ``path``; None where there is nothing, or the run beside it has changed since.

    Raises :class:`CoterieError` for a damaged file; ``again`` says how to measure again.
    """
    if not path.is_file():
        return None
    try:
        kept = of.validate_python(read_json(path, f"remove it, and {again}"))
    except ValidationError as fault:
        raise CoterieError(f"{path} is damaged; remove it, and {again}") from fault
    return kept if kept.summary == digest(path.parent) else None
