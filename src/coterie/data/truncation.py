"""What the limit on a row's length costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coterie.data.examples import Example
from coterie.data.rows import ClientData
from coterie.types import CoterieError, DataError


@dataclass(frozen=True)
class Truncation:
    """What the limit on a row's length costs: of ``rows`` rows, ``cut`` lose ``tokens`` tokens together."""

    rows: int = 0
    cut: int = 0
    tokens: int = 0

    @staticmethod
    def of(examples: Sequence[Example]) -> Truncation:
        return Truncation(len(examples), sum(e.cut > 0 for e in examples), sum(e.cut for e in examples))

    def __add__(self, other: Truncation) -> Truncation:
        return Truncation(self.rows + other.rows, self.cut + other.cut, self.tokens + other.tokens)

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of {self.rows:,} rows are longer than [model] max_length and lose {self.tokens:,} tokens "
            "together"
        )


def truncation_of_all(clients: Iterable[ClientData], of: Callable[[ClientData, str], Truncation]) -> Truncation:
    """The sum of ``of(client, split)`` over all splits with rows.

    Training rows of which one cannot be encoded are left out: they fail their client in its round, with the reason.
    Raises :class:`DataError` for such a row of another split, which would stop the run at its first evaluation.
    """
    total = Truncation()
    for client in clients:
        for split in (split for split, rows in client.splits.items() if rows):
            try:
                total += of(client, split)
            except CoterieError as fault:
                if split != "train":
                    raise DataError(f"client {client.info.id}, a {split} row: {fault}") from fault
    return total
