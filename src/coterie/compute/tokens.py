"""Tokenised rows in little memory: packed into flat arrays, and the least recently used dropped beyond a limit."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from coterie.data.examples import Example

Split = tuple[str, str]  # a client's id, and the name of one of its splits
LIMIT = 256 * 2**20  # bytes: 60 million tokens
_INT = "i"  # 4 bytes; in a tuple of Python integers, a token takes 40


@dataclass(frozen=True)
class Flat:
    """Sequences of numbers, one after the other; ``ends`` [n + 1] says where each stops, from 0 on."""

    values: array[int]
    ends: array[int]

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> Flat:
        values = array(_INT, [value for sequence in sequences for value in sequence])
        return Flat(values, array("q", accumulate(map(len, sequences), initial=0)))

    def all(self) -> list[tuple[int, ...]]:
        return [tuple(self.values[start:stop]) for start, stop in pairwise(self.ends)]

    @property
    def nbytes(self) -> int:
        return sum(len(part) * part.itemsize for part in (self.values, self.ends))


@dataclass(frozen=True)
class Packed:
    """The examples of a split. ``numbers`` holds label, prompt and number of choices of each, one after the other.

    ``skipped`` holds where each span begins and ends.
    """

    ids: Flat
    types: Flat | None
    numbers: array[int]
    choices: Flat
    skipped: Flat

    @staticmethod
    def of(examples: Sequence[Example]) -> Packed:
        types = [e.types for e in examples if e.types is not None]
        assert len(types) in (0, len(examples))  # a tokenizer gives types to all rows or to none
        numbers = array(_INT, [n for e in examples for n in (e.label, e.prompt, len(e.choices))])
        choices = Flat.of([choice for e in examples for choice in e.choices])
        skipped = Flat.of([tuple(at for span in e.skipped for at in span) for e in examples])
        return Packed(Flat.of([e.ids for e in examples]), Flat.of(types) if types else None, numbers, choices, skipped)

    def examples(self) -> list[Example]:
        ids, choices = self.ids.all(), iter(self.choices.all())
        types = self.types.all() if self.types else [None] * len(ids)
        labels, prompts, counts = (self.numbers[i::3] for i in range(3))
        skipped = [tuple(zip(at[::2], at[1::2], strict=True)) for at in self.skipped.all()]
        return [
            Example(of, kinds, label, prompt, tuple(next(choices) for _ in range(count)), spans)
            for of, kinds, label, prompt, count, spans in zip(ids, types, labels, prompts, counts, skipped, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        numbers = len(self.numbers) * self.numbers.itemsize
        return numbers + sum(flat.nbytes for flat in (self.ids, self.types, self.choices, self.skipped) if flat)


@dataclass
class TokenCache(MutableMapping[Split, list[Example]]):
    """The examples of many splits: the most recently used, at most ``limit`` bytes."""

    limit: int = LIMIT
    packed: OrderedDict[Split, Packed] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def __getitem__(self, key: Split) -> list[Example]:
        self.packed.move_to_end(key)
        return self.packed[key].examples()

    def __setitem__(self, key: Split, examples: list[Example]) -> None:
        if key in self:
            del self[key]
        self.packed[key] = made = Packed.of(examples)
        self.nbytes += made.nbytes
        while self.nbytes > self.limit and len(self.packed) > 1:
            del self[next(iter(self.packed))]

    def __delitem__(self, key: Split) -> None:
        self.nbytes -= self.packed.pop(key).nbytes

    def __iter__(self) -> Iterator[Split]:
        return iter(list(self.packed))  # a copy, because reading a split moves it

    def __len__(self) -> int:
        return len(self.packed)

    def __contains__(self, key: object) -> bool:
        return key in self.packed
