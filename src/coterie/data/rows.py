"""Rows of text, and the clients that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.types import ClientInfo

SPLITS = ("train", "validation", "test")
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


@dataclass(frozen=True)
class TextRow:
    """A row of classification: one sentence or a pair, and the index of its label in the client's label names."""

    text: str
    label: int
    text_pair: str | None = None


@dataclass(frozen=True)
class PromptRow:
    """A row of generation: the prompt, and the completion that the loss counts."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Turn:
    """What one of ``ROLES`` says in a conversation."""

    role: str
    text: str


@dataclass(frozen=True)
class ChatRow:
    """A row of generation: a conversation. The loss counts what the assistant says, in all its turns or in the last.

    At least one turn is the assistant's, and not the first.
    """

    turns: tuple[Turn, ...]

    @property
    def last(self) -> int:
        """The number of the assistant's last turn."""
        return max(number for number, turn in enumerate(self.turns) if turn.role == ASSISTANT)

    @property
    def prompt(self) -> str:
        """What was said before the assistant's last turn, for people to read."""
        before = self.turns[: self.last]
        return before[0].text if len(before) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in before)

    @property
    def completion(self) -> str:
        """What the assistant says last."""
        return self.turns[self.last].text


@dataclass(frozen=True)
class PreferenceRow:
    """A row of generation: two answers to the same prompt, of which people preferred the first."""

    chosen: PromptRow | ChatRow
    rejected: PromptRow | ChatRow

    @property
    def prompt(self) -> str:
        """What both answer, for people to read."""
        return self.chosen.prompt

    @property
    def completion(self) -> str:
        """The answer that people preferred."""
        return self.chosen.completion


@dataclass(frozen=True)
class ChoiceRow:
    """A row of multiple choice: the prompt, two or more candidates that may follow it, the index of the right one.

    A candidate follows the prompt directly, with no space put between them.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


GenerationRow = PromptRow | ChatRow | PreferenceRow
Row = TextRow | GenerationRow | ChoiceRow


def label_of(row: Row) -> int | None:
    """The index of the row's label, or of its right candidate; None for a row of generation."""
    match row:
        case TextRow():
            return row.label
        case ChoiceRow():
            return row.answer
        case PromptRow() | ChatRow() | PreferenceRow():
            return None


@dataclass(frozen=True)
class ClientData:
    """One client: what the server may know of it, and its rows by split (all of ``SPLITS``; a split may be empty)."""

    info: ClientInfo
    splits: Mapping[str, tuple[Row, ...]]


def client_data(
    name: str, group: str | None, rows: Mapping[str, Sequence[Row]], labels: tuple[str, ...] | None
) -> ClientData:
    """The client called ``name`` with its rows by split."""
    counts = {f"num_{split}": len(rows[split]) for split in SPLITS}
    info = ClientInfo(name, labels=labels, group=group, **counts)
    return ClientData(info, {split: tuple(rows[split]) for split in SPLITS})


@dataclass(frozen=True)
class FederatedData:
    """The clients in a fixed order, and the manifest: who got how many of what, from which files.

    ``notes``: what the user should know of the rows. ``newcomers`` take no part in the run.
    """

    clients: tuple[ClientData, ...]
    manifest: Mapping[str, object]
    notes: tuple[str, ...] = ()
    newcomers: tuple[ClientData, ...] = ()
