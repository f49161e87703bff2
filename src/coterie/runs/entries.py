"""A client's entry in the record of a round, and values as JSON takes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated

from pydantic import BeforeValidator

from coterie.energy import Energy


@dataclass(frozen=True)
class ClientRound:
    """A client's part in a round: bytes as encoded, seconds, what its reply reports of its training, and energy.

    ``said`` is empty where the reply was not used. In JSON its names are beside the others.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    said: Mapping[str, object] = field(default_factory=dict)
    energy: Energy | None = None

    @property
    def loss(self) -> float | None:
        """The mean training loss; None where the client did not report one."""
        value = self.said.get("loss")
        return value if isinstance(value, float) else self._number("loss")

    @property
    def tokens(self) -> int:
        """The tokens that it trained on."""
        return int(self._number("tokens") or 0)

    @property
    def gflop(self) -> float:
        """Billions of floating-point operations of its training; 0 where the client did not report them."""
        return self._number("gflop") or 0.0

    @property
    def gflop_active(self) -> float:
        """Those of them that the experts in use need; all of them where the client did not report a part."""
        part = self._number("gflop_active")
        return self.gflop if part is None else part

    def _number(self, name: str) -> float | None:
        """A finite number; an integer of JSON may be larger than any float."""
        value = self.said.get(name)
        return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None

    def to_json(self) -> dict[str, object]:
        own = {"bytes_down": self.bytes_down, "bytes_up": self.bytes_up, "seconds": self.seconds}
        known = own | ({"energy": plain(self.energy)} if self.energy else {})
        return {**{name: plain(value) for name, value in self.said.items() if name not in _OWN}, **known}


_OWN = frozenset(of.name for of in fields(ClientRound)) - {"said"}


def _fields_of_entry(line: Mapping[str, object]) -> dict[str, object]:
    """The fields of a :class:`ClientRound` in a line of JSON: names that are not its own are those of ``said``."""
    if not isinstance(line, Mapping):
        raise ValueError("it is not a JSON object")
    statistics = {name: value for name, value in line.items() if name not in _OWN}
    return {**{name: line[name] for name in _OWN if name in line}, "said": statistics}


EntryLine = Annotated[ClientRound, BeforeValidator(_fields_of_entry)]


def plain(value: object) -> object:
    """``value`` as ``json.dumps`` takes it: null for a number that is infinite or not a number."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {of.name: plain(getattr(value, of.name)) for of in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
