"""A site's answers as they should not be: changes of the message, each with a part of the reason that is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from coterie import codec
from coterie.flower.message import Message
from coterie.types import Key, Part, Reply


def with_reply(message: Message, change: Callable[[Reply], Reply]) -> Message:
    return Message(message.head, codec.encode(change(codec.decode(Reply, message.body))))


def first(reply: Reply, change: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    key = min(reply.tensors)
    return replace(reply, tensors={**reply.tensors, key: change(reply.tensors[key])})


def saying(message: Message, **info: Any) -> Message:
    """The reply with something else said of its training."""
    return with_reply(message, lambda r: replace(r, info={**r.info, **info}))


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {"a": made}
    return made


def flipped(blob: bytes) -> bytes:
    changed = bytearray(blob)
    changed[-9] ^= 4
    return bytes(changed)


SPOILED: dict[str, tuple[Callable[[Message], Message], str]] = {
    "nan": (lambda p: with_reply(p, lambda r: first(r, lambda t: t * float("nan"))), "not finite"),
    "shape": (lambda p: with_reply(p, lambda r: first(r, lambda t: t[:1])), "has the shape"),
    "keys": (lambda p: with_reply(p, lambda r: replace(r, tensors={})), "the reply lacks"),
    "integers": (lambda p: with_reply(p, lambda r: first(r, lambda t: t.int())), "not torch.float32"),
    "float8": (lambda p: with_reply(p, lambda r: first(r, lambda t: t.to(torch.float8_e4m3fn))), "not torch.float32"),
    "float64": (lambda p: with_reply(p, lambda r: first(r, lambda t: t.double())), "not torch.float32"),
    "a key with escapes": (
        lambda p: with_reply(p, lambda r: replace(r, tensors={**r.tensors, Key("\x1b[2J", 0, Part.A): torch.ones(1)})),
        "the reply has  [2J:0:A, which was not requested",
    ),
    "a loss of text": (lambda p: saying(p, loss="x"), "the reply's loss is 'x'"),
    "a loss beyond floats": (lambda p: saying(p, loss=10**400), "a number that is too large"),
    "a loss below zero": (
        lambda p: saying(p, loss=-1e15),
        "the reply's loss is -1000000000000000.0, not a number from 0",
    ),
    "a loss without sense": (
        lambda p: saying(p, loss=1e14),
        "the reply's loss is 100000000000000.0, not a number from",
    ),
    "a loss below everything": (lambda p: saying(p, loss=float("-inf")), "the reply's loss is -inf"),
    "a balance below zero": (lambda p: saying(p, balance=-1e14), "the reply's balance is -100000000000000.0, not"),
    "tokens without sense": (lambda p: saying(p, tokens=10**14), "number of tokens is 100000000000000, not an integer"),
    "half a token": (lambda p: saying(p, tokens=0.5), "number of tokens is 0.5, not an integer from 0 to"),
    "steps without sense": (
        lambda p: saying(p, steps=10**6),
        "number of steps is 1000000, not an integer from 0 to 30",
    ),
    "tokens of text": (lambda p: saying(p, tokens="y"), "number of tokens is 'y'"),
    "tokens without end": (lambda p: saying(p, tokens=float("inf")), "number of tokens is inf"),
    "steps of a list": (lambda p: saying(p, steps=[1]), "number of steps is a list"),
    "a deep tree": (lambda p: saying(p, importance=nested(70)), "is too large"),
    "a long text": (lambda p: saying(p, remark="x" * 10_000), "has a text that is too long"),
    "many numbers": (lambda p: saying(p, importance=[0] * 200_000), "is too large"),
    "rows beyond floats": (lambda p: with_reply(p, lambda r: replace(r, num_examples=10**400)), "that is too large"),
    "norm": (lambda p: with_reply(p, lambda r: first(r, lambda t: t + 1e9)), "above the bound"),
    "rows": (lambda p: with_reply(p, lambda r: replace(r, num_examples=10**6)), "1000000 training examples"),
    "garbage": (lambda p: Message(p.head, b"\x00garbage" * 99), "cannot be read"),
    "a flipped bit": (lambda p: Message(p.head, flipped(p.body)), "cannot be read"),
    "nothing": (lambda p: Message(p.head), "cannot be read"),
    "its own error": (lambda p: Message({"error": "no power"}), "no power"),
    "an error with escapes": (lambda p: Message({"error": "no\x1b[2J\npower\r" + 9999 * "."}), "no [2J power ..."),
    "an error that is no text": (lambda p: Message({"error": nested(70)}), "an error without a text"),
}
