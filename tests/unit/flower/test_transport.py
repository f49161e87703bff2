"""The Grid of a deployment as a transport: what a node sends can neither spoil what others sent nor fill the memory."""

from __future__ import annotations

import json
import random

import pytest

from coterie.flower.guard import MAX_HEAD, PullGuard, TooLargeError
from coterie.flower.message import Message
from http_grid import Store, transport_over

CHUNK = 5 * 2**20  # Flower's, bytes
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
    answers = dict(transport.receive({"bad": 1000, "good": 1000}))
    assert answers["good"] == GOOD
    assert isinstance(answers["bad"], Message)
    assert answers["bad"].head["error"].startswith("the reply cannot be read: Flower cannot decode it (")


def test_a_reply_that_claims_to_answer_another_message_does_not() -> None:
    """It comes back under the ticket that it claims; who receives it tells that this one was not its own."""
    store = Store()
    store.answer("mine", GOOD, claim="yours")
    assert transport_over(store).receive({"mine": 1000}) == [("yours", GOOD)]


def error_of(store: Store, ticket: str, limit: int) -> str:
    (answer,) = dict(transport_over(store).receive({ticket: limit})).values()
    assert isinstance(answer, Message)
    assert answer.body == b""
    return str(answer.head["error"])


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK + 1])
def test_a_body_of_the_limit_is_received(size: int) -> None:
    store, message = Store(), Message({"a": "b" * 1000}, bytes(range(256)) * (size // 256) + bytes(size % 256))
    store.answer("whole", message)
    assert transport_over(store).receive({"whole": size}) == [("whole", message)]


def test_a_body_beyond_the_limit_is_not_even_pulled() -> None:
    store = Store()
    store.answer("large", Message({}, random.Random(0).randbytes(12 * CHUNK)))
    assert error_of(store, "large", 10**6).endswith("it is larger than the 1000000 bytes allowed")
    assert store.pulled < 8 * CHUNK  # those that were under way


def test_a_chunk_that_an_array_names_many_times_is_not_copied() -> None:
    def bomb(content: bytes) -> bytes:
        if not content.startswith(b"Array "):
            return content
        kind, children, _ = content.partition(b"\0")[0].split(b" ")
        body = json.dumps({**json.loads(body_of(content)), "arraychunk_ids": [0] * 100_000}).encode()
        return b"%s %s %d\0%s" % (kind, children, len(body), body)

    store = Store()
    store.answer("bomb", Message({}, b"x" * 1000), change=bomb)
    assert "larger than the 2000000 bytes" in error_of(store, "bomb", 2 * 10**6)  # and not the 100 MB that it would be


def test_several_arrays_in_a_reply_are_refused() -> None:
    guard = PullGuard(10**6)
    guard.check(b"ArrayChunk  1\0x")
    guard.check(b"ArrayChunk  1\0y")
    guard.check(b'Array a 22\0{"arraychunk_ids": []}')
    with pytest.raises(TooLargeError):
        guard.check(b'Array b 22\0{"arraychunk_ids": []}')


@pytest.mark.parametrize("size", [MAX_HEAD, 25 * 10**6])
def test_a_head_that_is_not_small_is_refused(size: int) -> None:
    store = Store()
    store.answer("head", Message({"remark": "x" * size}, b"body"))
    assert error_of(store, "head", 10**9).startswith("the reply cannot be read: it")
