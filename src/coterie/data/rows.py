"""Rows of text, and the clients that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from coterie.types import ClientInfo, Json

Kind = Literal["classification", "generation"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TextRow:
    """A row to classify: one sentence or a pair, and the index of its label in the client's label names."""

    text: str
    label: int
    text_pair: str | None = None


@dataclass(frozen=True)
class PromptRow:
    """A row to generate: the prompt, and the completion that the loss counts."""

    prompt: str
    completion: str


Row = TextRow | PromptRow


@dataclass(frozen=True)
class ClientData:
    """One client: what the server may know of it, and its rows by split (all of ``SPLITS``, maybe empty)."""

    info: ClientInfo
    splits: Mapping[str, tuple[Row, ...]]


@dataclass(frozen=True)
class Federation:
    """The clients in a fixed order, and the manifest: who got how many of what, from which files."""

    clients: tuple[ClientData, ...]
    manifest: dict[str, Json]
