"""What a Parquet file says of its columns, from its footer (Thrift's compact protocol, and parquet.thrift).

pyarrow reads this too, but ends the whole process where some parts that nobody needs are damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias, cast

Value: TypeAlias = "int | bytes | list[Value] | Mapping[int, Value]"
_DEEPEST = 40  # of structs within structs; a footer has 6
_PLAIN_DICTIONARY, _DELTA_LENGTH, _DELTA_BYTES, _RLE_DICTIONARY = 2, 6, 7, 8


@dataclass(frozen=True)
class Chunk:
    """A column's part of a row group: its number of values, and its bytes without compression."""

    values: int
    size: int
    encodings: frozenset[int]

    @property
    def delta(self) -> bool:
        """Whether Arrow can read its texts in full only, and not as places in a list."""
        return not self.encodings.isdisjoint({_DELTA_LENGTH, _DELTA_BYTES})

    @property
    def repeats(self) -> bool:
        """Whether a text may repeat an earlier one or the start of it."""
        return not self.encodings.isdisjoint({_PLAIN_DICTIONARY, _DELTA_BYTES, _RLE_DICTIONARY})


def chunks_of(file: BinaryIO) -> list[list[Chunk]]:
    """The columns of every row group. Raises :class:`ValueError` or :class:`OSError` for a damaged footer."""
    file.seek(-8, 2)
    size = int.from_bytes(file.read(4), "little")
    file.seek(-8 - size, 2)
    try:
        groups = cast("list[Mapping[int, Value]]", _Thrift(file.read(size)).struct()[4])
        columns = [cast("list[Mapping[int, Value]]", group[1]) for group in groups]
        return [[_chunk(cast("Mapping[int, Value]", column[3])) for column in of] for of in columns]
    except (IndexError, KeyError, TypeError, AttributeError) as fault:
        raise ValueError("its footer is damaged") from fault


def _chunk(of: Mapping[int, Value]) -> Chunk:
    values, size, encodings = of[5], of[6], cast("list[int]", of[2])
    if not isinstance(values, int) or not isinstance(size, int) or min(values, size) < 0:
        raise ValueError("its footer has a column of a negative size")
    return Chunk(values, size, frozenset(encodings))


@dataclass
class _Thrift:
    """Structs become mappings from the numbers of their fields."""

    data: bytes
    at: int = 0
    depth: int = 0

    def struct(self) -> dict[int, Value]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("its footer is nested too deep")
        fields: dict[int, Value] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = int(head & 15 == 1) if head & 15 in (1, 2) else self._value(head & 15)
        self.depth -= 1
        return fields

    def _value(self, kind: int) -> Value:
        match kind:
            case 1 | 2 | 3:  # in a list, a boolean has a byte
                return self._byte()
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._unsigned())
            case 9 | 10:
                head = self._byte()
                size = head >> 4 if head >> 4 < 15 else self._unsigned()
                return [self._value(head & 15) for _ in range(size)]
            case 12:
                return self.struct()
        raise ValueError(f"its footer has a value of an unknown kind, {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("its footer ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("its footer has a number of too many bytes")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
