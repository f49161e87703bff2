"""The numbers that a method declares for a reply's ``info``: a missing one, or one out of range, is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coterie.engines.checks import fault_of
from coterie.types import Range, Reply

WANTED = {
    "cluster": Range(0, 3, whole=True),
    "share": Range(0, 1, optional=True),
    "norms": Range(names=frozenset({"up", "down"}), optional=True),
}
GOOD: dict[str, Any] = {"cluster": 2, "share": 0.5, "norms": {"up": 0.0, "down": 7}, "note": "other keys may be there"}


def fault(info: dict[str, Any]) -> str | None:
    return fault_of(Reply({}, 5, info), {}, 1e4, 5, WANTED)


def test_what_is_declared_passes_and_so_do_other_keys() -> None:
    assert fault(GOOD) is None
    assert fault({"cluster": 0}) is None


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({}, "the reply's info lacks cluster"),
        ({"cluster": 4}, "the reply's cluster is 4, not an integer from 0 to 3"),
        ({"cluster": 1.0}, "the reply's cluster is 1.0, not an integer from 0 to 3"),
        ({"cluster": True}, "the reply's cluster is true, not an integer from 0 to 3"),
        ({**GOOD, "share": -0.1}, "the reply's share is -0.1, not a number from 0 to 1"),
        ({**GOOD, "share": math.nan}, "the reply's share is nan, not a number from 0 to 1"),
        ({**GOOD, "share": None}, "the reply's share is a NoneType, not a number from 0 to 1"),
        ({**GOOD, "norms": {"up": 1.0}}, "the reply's norms must have a number for each of down, up"),
        ({**GOOD, "norms": 1.0}, "the reply's norms must have a number for each of down, up"),
        ({**GOOD, "norms": {"up": 1.0, "down": "x"}}, "the reply's norms['down'] is 'x', not a number from 0 to 1e+15"),
    ],
)
def test_what_is_not_is_refused_with_the_reason(info: dict[str, Any], reason: str) -> None:
    assert fault(info) == reason
