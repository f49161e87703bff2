"""Bundles of older formats, as they were written, and what they are now."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from coterie.adapters.about import About
from coterie.types import Bank, ExportedAs, TaskKind


@dataclass(frozen=True)
class _About2:
    method: str
    round: int
    export: ExportedAs
    task: TaskKind
    base: str
    base_path: str
    base_sha256: str
    max_length: int
    client: str
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class _About3(_About2):
    chat_template: str


@dataclass(frozen=True)
class Bundle2:
    """Format 2: without ``chat_template``, so that the tokenizer's own is the one that training used."""

    bank: Bank
    about: _About2
    format: int

    @property
    def now(self) -> About:
        return About(**asdict(self.about))


@dataclass(frozen=True)
class Bundle3(Bundle2):
    """Format 3: without ``texts``."""

    about: _About3
