"""The bytes that a site's answer may have, by the kind of message. For training the method says what it expects."""

from __future__ import annotations

import math

from coterie.types import BaseSpec, Instruction

HELLO = 2**24
EVALUATION = 2**26
_FLOAT_BYTES = 4
_EXPERTS = 16  # of the largest rank, on every target


def bank_limit(spec: BaseSpec, labels: int, max_rank: int, sent: Instruction) -> int:
    """For a site's bank: what it was ``sent``, some experts of ``max_rank``, a head for so many ``labels``."""
    expert = max_rank * sum(target.d_in + target.d_out for target in spec.targets)
    head = sum(math.prod(parameter.shape_for(labels)) for parameter in spec.head)
    values = sum(value.numel() for value in sent.tensors.values())
    return _FLOAT_BYTES * (_EXPERTS * expert + head + values) + EVALUATION
