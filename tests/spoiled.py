"""A site's answers as they should not be: changes of the parcel, each with a part of the reason that is to be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from coterie import codec
from coterie.engines.parcel import Parcel
from coterie.types import Reply


def with_reply(parcel: Parcel, change: Callable[[Reply], Reply]) -> Parcel:
    return Parcel(parcel.head, codec.encode(change(codec.decode(Reply, parcel.blob))))


def first(reply: Reply, change: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    key = min(reply.tensors)
    return replace(reply, tensors={**reply.tensors, key: change(reply.tensors[key])})


def flipped(blob: bytes) -> bytes:
    changed = bytearray(blob)
    changed[-9] ^= 4
    return bytes(changed)


SPOILED: dict[str, tuple[Callable[[Parcel], Parcel], str]] = {
    "nan": (lambda p: with_reply(p, lambda r: first(r, lambda t: t * float("nan"))), "not finite"),
    "shape": (lambda p: with_reply(p, lambda r: first(r, lambda t: t[:1])), "has the shape"),
    "keys": (lambda p: with_reply(p, lambda r: replace(r, tensors={})), "the reply has no"),
    "integers": (lambda p: with_reply(p, lambda r: first(r, lambda t: t.int())), "not a floating one"),
    "norm": (lambda p: with_reply(p, lambda r: first(r, lambda t: t + 1e9)), "above the bound"),
    "rows": (lambda p: with_reply(p, lambda r: replace(r, num_examples=10**6)), "1000000 examples"),
    "garbage": (lambda p: Parcel(p.head, b"\x00garbage" * 99), "cannot be read"),
    "a flipped bit": (lambda p: Parcel(p.head, flipped(p.blob)), "cannot be read"),
    "nothing": (lambda p: Parcel(p.head), "cannot be read"),
    "its own error": (lambda p: Parcel({"error": "no power"}), "no power"),
}
