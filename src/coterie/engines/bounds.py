"""How much one client may weigh in a round, in bytes, in its update and in its share of a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coterie.types import Key

_INFO_BYTES = 2**21  # for what a reply says beside its tensors
_KEY_BYTES = 400  # per tensor, beside its name: type, shape and place, twice
_FLOAT_BYTES = 4


def reply_limit(expected: Mapping[Key, tuple[int, ...]]) -> int:
    """The bytes that an encoded reply with the ``expected`` shapes (all float32) has at most."""
    tensors = sum(_FLOAT_BYTES * math.prod(shape) for shape in expected.values())
    names = sum(_KEY_BYTES + 4 * len(str(key).encode()) for key in expected)
    return tensors + names + _INFO_BYTES
