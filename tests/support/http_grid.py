"""Flower's own Grid of a deployment over a SuperLink that is a dictionary: its code for pulling replies really runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Message as FlowerMessage
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from coterie.flower.app import GridTransport
from coterie.flower.message import Message, pack


@dataclass
class Store:
    """A SuperLink's side of the Runtime API: replies by the ticket of the message that they answer."""

    replies: dict[str, list[FlowerMessage]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pulled: int = 0  # bytes of objects

    def answer(
        self, ticket: str, message: Message, change: Callable[[bytes], bytes] = lambda content: content, claim: str = ""
    ) -> None:
        """Keep ``message`` as the reply to ``ticket``; ``change`` its objects; let it ``claim`` to answer another."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        sent = FlowerMessage(pack(Message()), dst_node_id=12, message_type="train")
        sent.metadata.__dict__["_message_id"] = claim or ticket
        made = FlowerMessage(pack(message), reply_to=sent)
        made.metadata.__dict__["_message_id"] = made.object_id
        self.objects |= {name: change(value.deflate()) for name, value in get_all_nested_objects(made).items()}
        self.replies.setdefault(ticket, []).append(made)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        found = [m for ticket in request.message_ids for m in self.replies.pop(ticket, [])]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(m)) for m in found],
            message_object_trees=[get_object_tree(m) for m in found],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        content = self.objects[request.object_id]
        self.pulled += len(content)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:  # noqa: N802
        return ConfirmMessageReceivedResponse()


def transport_over(store: Store) -> GridTransport:
    grid = HttpGrid(token="a token")
    grid._client, grid._run = store, SimpleNamespace(run_id=1)  # type: ignore[assignment]
    return GridTransport(grid)
