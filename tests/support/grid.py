"""A Grid in process: Flower's messages and apps without its SuperLink."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from coterie.flower.app import client_app_of
from coterie.flower.message import Message

Answer = Callable[[Message], Message]


@dataclass
class InProcessGrid(Grid):
    """A Grid over ClientApps in this process: the same messages and the same apps, no SuperLink.

    Payloads are bytes and text on both sides, so nothing can be shared by accident. ``spoil`` sees every reply before
    it is delivered, and may change it, hold it back (None), or turn it into an error.
    """

    sites: dict[int, Answer]
    keys: dict[int, bytes] = field(default_factory=dict)
    spoil: Callable[[int, FlowerMessage], FlowerMessage | None] = lambda node, message: message
    waiting: dict[str, FlowerMessage] = field(default_factory=dict)
    sent: int = 0

    def __post_init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> FlowerMessage:
        return FlowerMessage(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.sites]

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: FlowerMessage) -> str:
        self.sent += 1
        message.metadata.__dict__["_message_id"] = f"message-{self.sent}"
        self.waiting[f"message-{self.sent}"] = message
        return f"message-{self.sent}"

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """One reply at a time: a site works when its message is asked for."""
        return next(([reply] for ticket in message_ids for reply in self._reply(ticket)), [])

    def _reply(self, ticket: str) -> Iterator[FlowerMessage]:
        message = self.waiting.pop(ticket, None)
        if message is None:
            return
        node = message.metadata.dst_node_id
        if node in self.sites:
            app = client_app_of(lambda inner, context, left: self.sites[node](inner))
            made = app(message, Context(1, node, {}, RecordDict(), {}))
        else:
            made = FlowerMessage(Error(5, "the node is gone"), reply_to=message)
        spoiled = self.spoil(node, made)
        if spoiled is not None:
            yield spoiled

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        return [reply for ticket in self.push_messages(messages) for reply in self._reply(ticket)]
