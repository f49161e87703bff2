"""Gaussian noise for releases: from a secret key, through a cryptographic function; in tests from the run's streams.

The noise of a key is a function of the key and of what it is for. Who names the released values in the purpose gets the
same noise for the same values, and independent noise for any others: a repeated computation releases nothing new.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from coterie.ops.streams import stream

KEY_BYTES = 32
_DRAWS = 4  # summed up, so that no single value shows the rounding of one (Holohan and Braghin, arXiv 2107.10138)


class Noise(Protocol):
    """A source of random values."""

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Standard normal values of ``shape``, float64, for this purpose."""
        ...

    def uniform(self, count: int, *purpose: str | int) -> Tensor:
        """``count`` values from 0 to 1, float64, for this purpose."""
        ...

    def name(self, values: str) -> str:
        """A name for noise on these ``values``, given by a digest of them: another source gives another name."""
        ...

    def purpose(self, values: str, rnd: int) -> str:
        """What noise on these ``values`` in round ``rnd`` is drawn for."""
        ...


@dataclass(frozen=True)
class SecureNoise:
    """Noise from SHAKE-256 over a secret ``key``; by default one from the operating system."""

    key: bytes = b""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or secrets.token_bytes(KEY_BYTES))

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        count = math.prod(shape)
        pairs = self.uniform(_DRAWS * 2 * ((count + 1) // 2), *purpose).view(_DRAWS, 2, -1)
        radius, angle = (-2 * pairs[:, 0].log()).sqrt(), 2 * math.pi * pairs[:, 1]
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return (drawn.sum(0) / math.sqrt(_DRAWS))[:count].reshape(shape)

    def uniform(self, count: int, *purpose: str | int) -> Tensor:
        """``count`` values above 0 and up to 1, float64."""
        text = "\x1f".join(map(str, purpose)).encode()
        drawn = hashlib.shake_256(len(self.key).to_bytes(2, "little") + self.key + text).digest(8 * count)
        whole = torch.frombuffer(bytearray(drawn), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
        return ((whole >> 11 & (2**53 - 1)).double() + 1) / 2.0**53

    def name(self, values: str) -> str:
        return hashlib.sha256(self.key + values.encode()).hexdigest()

    def purpose(self, values: str, rnd: int) -> str:
        return values  # other values never get the same noise, which a difference would take off


@dataclass(frozen=True)
class SeededNoise:
    """Noise from the run's random streams, which anyone who knows the seed can draw too: for tests."""

    seed: int

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.randn(shape, generator=self._stream(purpose), dtype=torch.float64)

    def uniform(self, count: int, *purpose: str | int) -> Tensor:
        """``count`` values from 0 to 1, float64."""
        return torch.rand(count, generator=self._stream(purpose), dtype=torch.float64)

    def name(self, values: str) -> str:
        return f"seed {self.seed} {values}"

    def purpose(self, values: str, rnd: int) -> str:
        return f"round {rnd}"  # engines differ in the last bits of values

    def _stream(self, purpose: tuple[str | int, ...]) -> torch.Generator:
        return stream(self.seed, "privacy", *purpose)


def noise_from(source: Literal["secure", "seeded"], seed: int) -> SecureNoise | SeededNoise:
    """A client's own noise: from a new key that nobody keeps, or in tests from the run's ``seed``."""
    return SeededNoise(seed) if source == "seeded" else SecureNoise()
