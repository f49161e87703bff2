"""The Grid of a deployment as a transport: what one node sends cannot spoil what the others sent."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr")

from coterie.flower.message import Message
from http_grid import Store, transport_over

GOOD, BAD = Message({"seconds": 1.0}, b"good" * 99), Message({"seconds": 2.0}, b"bad" * 9)  # with no object in common


def body_of(content: bytes) -> bytes:
    """An object's content without its head."""
    return content.split(b"\0", 1)[1]


def garbled(kind: bytes) -> object:
    """Objects of a ``kind`` with as many bytes as they had, and none of their own."""

    def change(content: bytes) -> bytes:
        body = body_of(content)
        return content[: -len(body)] + b"\xff" * len(body) if content.startswith(kind + b" ") and body else content

    return change


@pytest.mark.parametrize("kind", [b"Message", b"RecordDict", b"ArrayRecord", b"ConfigRecord", b"Array"])
def test_an_object_that_cannot_be_decoded_is_its_nodes_fault_alone(kind: bytes) -> None:
    store = Store()
    store.answer("bad", BAD, change=garbled(kind))
    store.answer("good", GOOD)
    transport = transport_over(store)
    answers = dict(transport.receive(["bad", "good"]))
    assert answers["good"] == GOOD
    assert isinstance(answers["bad"], Message)
    assert answers["bad"].head["error"].startswith("the reply cannot be read: Flower cannot decode it (")


def test_a_reply_that_claims_to_answer_another_message_does_not() -> None:
    """It comes back under the ticket that it claims; who receives it tells that this one was not its own."""
    store = Store()
    store.answer("mine", GOOD, claim="yours")
    assert transport_over(store).receive(["mine"]) == [("yours", GOOD)]
