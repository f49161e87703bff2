"""Cases of which the default suite runs some, and the slow one all: enough that every value of a setting occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

PUBLISHED = frozenset({"fedlease", "fedamole", "smartfed"})  # the three systems; the other methods are baselines


def thinned(cases: Iterable[tuple[Any, ...]], always: Callable[..., bool]) -> list[Any]:
    """The cases for ``parametrize``; those for which ``always`` is false are marked slow."""
    return [pytest.param(*case, marks=() if always(*case) else pytest.mark.slow) for case in cases]
