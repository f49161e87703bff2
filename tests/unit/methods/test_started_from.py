"""The server measures an update from where the client started: what a client sends that did not move."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from halves import Play, moved, still

ELSEWHERE = {"fedlease", "fedamole", "smartfed"}  # their clients need answers that these halves do not give


@pytest.mark.parametrize("head", ["personal", "shared"])
@pytest.mark.parametrize("name", sorted(methods().keys() - ELSEWHERE))
def test_a_client_that_does_not_move_sends_what_it_started_from(name: str, head: Any) -> None:
    kind = method_named(name)
    play = Play(kind(kind.Settings(), Plan(rank=2, alpha=4, head=head)))
    for train in (still, moved, moved, still):
        play.round(train)
