"""What travels between a server and a site: a head of JSON and a body of bytes, bit for bit as they were sent.

Flower sends a message as one array of bytes, whatever the dtypes of the tensors in it, beside the head as JSON text.
Nothing here imports torch: Flower starts a process with the ClientApp for every single message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

KINDS = ("query.hello", "train", "evaluate", "query.bank", "query.sum", "query.onboard")


@dataclass(frozen=True)
class Message:
    """``head`` is JSON, and small; ``body`` is what :mod:`coterie.codec` wrote, or empty."""

    head: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""


class BrokenMessageError(ValueError):
    """The content that arrived is not a message."""


class Transport(Protocol):
    """Carries messages to nodes and their answers back; see :class:`coterie.flower.app.GridTransport`."""

    @property
    def pause(self) -> float:
        """Seconds to wait before asking again, where nothing has arrived."""
        ...

    def nodes(self) -> Mapping[int, str]:
        """The connected nodes, each with the SHA-256 of its public key ('' where it has none)."""
        ...

    def send(self, to: Sequence[tuple[int, str, Message]], ttl: float, group: str) -> list[str | None]:
        """A ticket per (node, kind, message), None for one that was not accepted; ``ttl`` in seconds."""
        ...

    def receive(self, tickets: Mapping[str, int]) -> list[tuple[str, Message | str]]:
        """What has arrived since: per ticket an answer, or the reason why there will be none.

        ``tickets`` has the bytes that the body of each answer may have at most.
        """
        ...


def head_of(text: str) -> dict[str, Any]:
    """The head in the JSON of ``text``. Raises :class:`BrokenMessageError`."""
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise BrokenMessageError("its head is not JSON") from fault
    if not isinstance(head, dict):
        raise BrokenMessageError("its head is not a JSON object")
    return head


def pack(message: Message) -> RecordDict:
    """``message`` as the content of one of Flower's messages."""
    array = Array(dtype="uint8", shape=(len(message.body),), stype="safetensors", data=message.body)
    head = ConfigRecord({"json": json.dumps(message.head)})
    return RecordDict({"body": ArrayRecord({"body": array}), "head": head})


def unpack(content: RecordDict, max_head: int = sys.maxsize) -> Message:
    """The message in the content of one of Flower's, with a head of at most ``max_head`` characters.

    Raises :class:`BrokenMessageError`.
    """
    bodies, heads = content.array_records, content.config_records
    if set(bodies) != {"body"} or set(heads) != {"head"} or set(bodies["body"]) != {"body"}:
        raise BrokenMessageError("it is not exactly a head and a body")
    text = heads["head"].get("json")
    if not isinstance(text, str):
        raise BrokenMessageError("its head is not text")
    if len(text) > max_head:
        raise BrokenMessageError(f"its head has {len(text)} characters; the limit is {max_head}")
    return Message(head_of(text), bodies["body"]["body"].data)
