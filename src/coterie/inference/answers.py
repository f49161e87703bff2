"""The answer of a model to one row, one type for each task, and the columns that each becomes in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Value = str | int | float | Sequence[float] | Mapping[str, float]  # of a column of an answer


@dataclass(frozen=True)
class LabelAnswer:
    """Classification: the most probable label, and the probability of every label, which add up to 1."""

    label: str
    probabilities: Mapping[str, float]

    def columns(self) -> dict[str, Value]:
        """The answer as columns of a file."""
        return {
            "prediction": self.label,
            "probability": self.probabilities[self.label],
            "probabilities": self.probabilities,
        }


@dataclass(frozen=True)
class TextAnswer:
    """Generation: the text that follows the prompt."""

    text: str

    def columns(self) -> dict[str, Value]:
        """The answer as columns of a file."""
        return {"prediction": self.text}


@dataclass(frozen=True)
class ChoiceAnswer:
    """Multiple choice: the chosen candidate, its index, and the mean log-probability per token of every candidate."""

    choice: str
    index: int
    scores: tuple[float, ...]

    def columns(self) -> dict[str, Value]:
        """The answer as columns of a file."""
        return {"prediction": self.choice, "choice": self.index, "scores": self.scores}


Answer = LabelAnswer | TextAnswer | ChoiceAnswer
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "classification": ("prediction", "probability", "probabilities"),
    "generation": ("prediction",),
    "multiple_choice": ("prediction", "choice", "scores"),
}  # by task, the columns of an answer


@dataclass(frozen=True)
class Rejected:
    """A row that has no answer, and why; ``reason`` begins with where the row is."""

    reason: str
