"""Flower's two apps: the ServerApp with the server's end of the messages, and the ClientApp with a site's.

Nothing here imports torch when it is imported: Flower starts a process with the ClientApp for every single message.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from google.protobuf.message import Error as ProtobufError

from coterie.flower.guard import MAX_HEAD, TooLargeError, at_most
from coterie.flower.local_socket import WorkerDiedError, hand_over
from coterie.flower.message import KINDS, BrokenMessageError, Message, pack, unpack

Answer = Callable[[Message, Context, float], Message]  # message, Flower's context, seconds left

# What Flower raises for objects that are not what they should be. All else is not the sender's fault.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    ProtobufError,
)
_WORKER_PAUSE = 1.0  # seconds between attempts to reach a worker that is being started again
_WORKER_DEATHS = 3  # with the same message: the first deaths may have another cause


# the server ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridTransport:
    """Flower's Grid as a :class:`coterie.flower.message.Transport`."""

    grid: Grid
    pause: float = 0.5

    def nodes(self) -> dict[int, str]:
        nodes = self.grid.get_nodes()
        return {n.node_id: hashlib.sha256(n.public_key).hexdigest() if n.public_key else "" for n in nodes}

    def send(self, to: Sequence[tuple[int, str, Message]], ttl: float, group: str) -> list[str | None]:
        messages = [FlowerMessage(pack(m), dst_node_id=n, message_type=k, ttl=ttl, group_id=group) for n, k, m in to]
        tickets = [ticket or None for ticket in self.grid.push_messages(messages)] if messages else []
        return tickets if len(tickets) == len(to) else [None] * len(to)

    def receive(self, tickets: Mapping[str, int]) -> list[tuple[str, Message | str]]:
        # One by one: what one node sent can spoil the pull that it is part of, and Flower keeps nothing of it.
        return [arrived for ticket, limit in tickets.items() for arrived in self._pull(ticket, limit)]

    def _pull(self, ticket: str, limit: int) -> list[tuple[str, Message | str]]:
        try:
            with at_most(self.grid, limit):
                messages = list(self.grid.pull_messages([ticket]))
        except TooLargeError as fault:
            return [(ticket, _broken(str(fault)))]
        except UNREADABLE as fault:
            return [(ticket, _broken(f"Flower cannot decode it ({type(fault).__name__})"))]
        # Matched by ticket, not by sender: an error about a dead node is sent by the SuperLink.
        return [(message.metadata.reply_to_message_id, read(message, limit)) for message in messages]


def read(message: FlowerMessage, limit: int | None = None) -> Message | str:
    """What one of Flower's messages holds, or Flower's own reason why there is no answer.

    With a ``limit`` on the bytes of the body, the head too must be small.
    """
    if message.has_error():
        return f"Flower reports error {message.error.code}: {first_line(message.error.reason)}"
    try:
        content = unpack(message.content) if limit is None else unpack(message.content, MAX_HEAD)
    except BrokenMessageError as fault:
        return _broken(str(fault))
    if limit is not None and len(content.body) > limit:
        return _broken(f"it is larger than the {limit} bytes allowed")
    return content


def _broken(reason: str) -> Message:
    """The answer of a site whose reply cannot be read: its own fault, and no reason to send it the message again."""
    return Message({"error": f"the reply cannot be read: {reason}"})


def first_line(text: str | None) -> str:
    """The first line of a reason that a library gave, at most 300 characters."""
    return (text or "no reason given").strip().splitlines()[0][:300]


def server_app(main: Callable[[GridTransport, Mapping[str, object]], None]) -> ServerApp:
    """A ServerApp that calls ``main`` with the transport and the run's config."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridTransport(grid), context.run_config)

    return app


# a site --------------------------------------------------------------------------------------------------------------


def client_app_of(answer: Answer) -> ClientApp:
    """A ClientApp that answers every kind of message with ``answer``."""
    app = ClientApp()

    def handle(message: FlowerMessage, context: Context) -> FlowerMessage:
        left = message.metadata.created_at + message.metadata.ttl - time.time()
        try:
            reply = answer(unpack(message.content), context, left)
        except BrokenMessageError as fault:
            reply = Message({"error": f"the message cannot be read: {fault}"})
        return FlowerMessage(pack(reply), reply_to=message)

    for kind in KINDS:
        category, _, action = kind.partition(".")
        register = getattr(app, category)
        (register(action) if action else register())(handle)
    return app


def answer_of_worker(message: Message, context: Context, left: float) -> Message:
    """The worker's answer. Tries again while there is time: a worker that died is being started again.

    If the worker dies, the message is handed over again, three times in all.
    """
    deaths, path = 0, str(context.node_config.get("socket", ""))
    end = time.monotonic() + min(left, float(message.head.get("patience", left)))
    while True:
        try:
            return hand_over(path, message, max(0.1, end - time.monotonic()))
        except TimeoutError:
            return Message({"error": "the site's worker was not done in time"})
        except PermissionError:
            return Message({"error": "the site's worker socket belongs to another user"})
        except BrokenMessageError as fault:
            return Message({"error": f"the worker's answer cannot be read: {fault}"})
        except OSError as fault:
            deaths += isinstance(fault, WorkerDiedError)
            if deaths == _WORKER_DEATHS:
                return Message({"error": "the site's worker died while handling this message; see site.log there"})
            if time.monotonic() + _WORKER_PAUSE > end:
                return Message({"error": f"the site's worker cannot be reached ({fault.strerror or fault})"})
            time.sleep(_WORKER_PAUSE)


client_app = client_app_of(answer_of_worker)
