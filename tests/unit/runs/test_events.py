"""Events come back from their JSON as they were, whatever a client's reply said."""

from __future__ import annotations

import json

import pytest

from coterie.runs.entries import ClientRound
from coterie.runs.events import (
    RUN,
    CheckpointSaved,
    ClientDone,
    ClientEvaluated,
    ClientSteps,
    Evaluated,
    Event,
    Note,
    Ready,
    Resumed,
    RoundDone,
    RoundStart,
    StartState,
    Truncated,
    from_json,
)

ENTRY = ClientRound(10, 20, 1.5, {"loss": 0.5, "clusters": [1, 2]})
EVENTS: list[Event] = [
    Ready(3, 5, "runs/one"),
    Resumed(2),
    Note("a text"),
    Note("a text", 3),
    StartState(describe={"notes": ["a"]}),
    Truncated(40, 3, 120),
    RoundStart(1, ["a", "b"]),
    ClientSteps(1, ["a", "b"], 3, 40),
    ClientDone(1, "a", ENTRY, None),
    ClientDone(1, "a", ClientRound(10), "its norm is too large"),
    RoundDone(1, {"a": ENTRY}, {"b": "late"}, 2.0, {"clusters": {"a": 0}}, 7),
    ClientEvaluated(1, "a", 2),
    Evaluated(1, {"a": {"test": {"loss": 0.5}}}, {"test": {"loss": 0.5}}, None, 1.0),
    CheckpointSaved(4),
]


def test_every_kind_is_here() -> None:
    assert {event.event for event in EVENTS} == RUN.keys()


@pytest.mark.parametrize("event", EVENTS, ids=[event.event for event in EVENTS])
def test_an_event_comes_back_from_its_json(event: Event) -> None:
    assert from_json(json.loads(json.dumps(event.to_json()))) == event


@pytest.mark.parametrize("name", ["loss", "tokens", "gflop", "gflop_active"])
def test_a_number_larger_than_any_float_counts_as_none(name: str) -> None:
    entry = ClientRound(said={name: 10**400})
    assert (entry.loss, entry.tokens, entry.gflop, entry.gflop_active) == (None, 0, 0.0, 0.0)


def test_an_entry_of_a_round_that_is_no_object_is_named() -> None:
    with pytest.raises(ValueError, match="it is not a JSON object"):
        from_json({"event": "round", "round": 1, "clients": {"a": None}})
