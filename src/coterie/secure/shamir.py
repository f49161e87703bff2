"""Shamir's secret sharing (1979): a secret of 32 bytes in shares of 33, any ``threshold`` of which give it back.

The secret is the constant term of a random polynomial of degree ``threshold`` - 1 over the integers modulo
2^256 + 297, the smallest prime above 2^256; the share at the point x is its value there. Fewer shares say nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Collection[int]) -> dict[int, bytes]:
    """A share of ``secret`` for each of ``points``, numbers from 1.

    Raises :class:`ValueError` for a secret of another size, and for points that are fewer than ``threshold`` or not
    different numbers from 1.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(set(points)) == len(points) or not all(1 <= x < PRIME for x in points):
        raise ValueError(f"{threshold} of the points {sorted(points)}: they must be that many, different, and from 1")
    polynomial = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(polynomial, x).to_bytes(SHARE_BYTES) for x in points}


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret whose shares, by point, are exactly these. Raises :class:`ValueError` if no secret has them."""
    if not shares or any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ValueError(f"a share has {SHARE_BYTES} bytes")
    total = 0
    for x, share in shares.items():
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        total += int.from_bytes(share) * above * pow(below, -1, PRIME)
    secret = total % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("these are not shares of one secret")
    return secret.to_bytes(SECRET_BYTES)


def _value(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
