"""Numbers from -bound to bound as integers, so that their sum is exact modulo 2^64.

The grid has 2^(bits - 1) steps from 0 to ``bound``. n such integers add up to at most n 2^(bits - 1), which has to stay
below 2^63: then the sum of numbers, negative ones too, is read off the sum modulo 2^64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.uint64]  # modulo 2^64; the upper half stands for negative numbers
Numbers = NDArray[np.float64]


def most_members(bits: int) -> int:
    """The largest number of vectors whose sum cannot overflow."""
    return int(2 ** (64 - bits)) - 1


def encode(values: Numbers, bound: float, bits: int) -> Integers:
    """``values`` [n] on the grid. Raises :class:`ValueError` where one is not finite or larger than ``bound``."""
    if not bool((np.abs(values) <= bound).all()):
        raise ValueError(f"a value is outside the range from {-bound:g} to {bound:g}")
    return np.rint(values * (2.0 ** (bits - 1) / bound)).astype(np.int64).view(np.uint64)


def encode_noisy(values: Numbers, noise: Numbers, bound: float, bits: int) -> Integers:
    """``values`` [n] rounded toward zero, so that they are no longer, plus ``noise`` [n], rounded whatever the values.

    Raises as :func:`encode`, for a value with its noise.
    """
    steps = 2.0 ** (bits - 1) / bound
    total = np.trunc(values * steps) + np.rint(noise * steps)
    if not bool((np.abs(total) <= 2.0 ** (bits - 1)).all()):
        raise ValueError(f"a value is outside the range from {-bound:g} to {bound:g}")
    return total.astype(np.int64).view(np.uint64)


def decode(total: Integers, bound: float, bits: int) -> Numbers:
    """The numbers [n] that the sum of encoded vectors stands for."""
    return total.view(np.int64).astype(np.float64) * (bound / 2.0 ** (bits - 1))
