"""The worker of a site that misbehaves; see ``misbehaving.py``."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field

from coterie.deploy import worker, worker_process
from coterie.flower import local_socket
from coterie.flower.message import Message
from spoiled import SPOILED

_NOISE = b"\x07noise" * 999


@dataclass
class Misbehaving(worker.Worker):
    """A worker that computes its answers as any other does, and then spoils them, or keeps them to itself."""

    plan: dict[str, str] = field(default_factory=dict)

    def answer(self, message: Message) -> Message:
        made = super().answer(message)
        what = self.plan.get(str(message.head.get("round")), "") if message.head.get("kind") == "train" else ""
        if what:
            (self.state / f"misbehaves-{message.head['round']}").touch()
        if what == "noise":
            return Message({"noise": True})
        if what.startswith("late "):
            time.sleep(float(what.removeprefix("late ")))
        elif what == "never":
            time.sleep(message.head["patience"] + 1.0)  # the ClientApp of its site has given up then
        return SPOILED[what][0](made) if what in SPOILED else made


def send(to: socket.socket, message: Message) -> None:
    if message.head.get("noise"):
        to.sendall(_NOISE)
    else:
        local_socket.send(to, message)


def work(path: str, door: str, plan: str) -> None:
    worker_process.send = send  # type: ignore[attr-defined]
    worker_process.Worker = lambda site, root: Misbehaving(site, root, plan=json.loads(plan))  # type: ignore[misc, assignment]
    worker_process.work(path, door)
