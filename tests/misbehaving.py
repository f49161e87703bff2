"""`coterie join` of a site that misbehaves by a plan: all of it is real but what its worker does with an answer.

    python tests/misbehaving.py PLAN join SITE.toml --insecure

PLAN is JSON. ``{"1": "nan", "3": "late 20"}`` names what happens to the answer of a round of training: a name of
:data:`spoiled.SPOILED`; ``noise``, bytes that are no parcel; ``late S``, after S seconds; ``never``.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from coterie.engines import parcel as parcels
from coterie.engines.parcel import Parcel
from coterie.federation import site, worker

_NOISE = b"\x07noise" * 999


def plan_of_losses(client: str, share: float, rounds: int, seed: int) -> dict[str, str]:
    """A plan by which every answer is lost with the probability ``share``."""
    draw = random.Random(f"{seed} {client}")
    return {str(rnd): "never" for rnd in range(1, rounds + 1) if draw.random() < share}


@dataclass
class Misbehaving(worker.Worker):
    """A worker that computes its answers as any other does, and then spoils or keeps them."""

    plan: dict[str, str] = field(default_factory=dict)

    def answer(self, parcel: Parcel) -> Parcel:
        from spoiled import SPOILED

        made = super().answer(parcel)
        what = self.plan.get(str(parcel.head.get("round")), "") if parcel.head.get("kind") == "train" else ""
        if what:
            (self.state / f"misbehaves-{parcel.head['round']}").touch()
        if what == "noise":
            return Parcel({"noise": True})
        if what.startswith("late "):
            time.sleep(float(what.removeprefix("late ")))
        elif what == "never":
            time.sleep(parcel.head["patience"] + 1.0)  # the ClientApp of its site has given up then
        return SPOILED[what][0](made) if what in SPOILED else made


def send(to: socket.socket, parcel: Parcel) -> None:
    if parcel.head.get("noise"):
        to.sendall(_NOISE)
    else:
        parcels.send(to, parcel)


def work(path: str, door: str, plan: str) -> None:
    """The process of the worker."""
    worker.send = send  # type: ignore[attr-defined]
    site.Worker = lambda settings, root: Misbehaving(settings, root, plan=json.loads(plan))  # type: ignore[attr-defined, assignment]
    site.work(path, door)


def main() -> None:
    from coterie.cli import main as coterie

    plan = sys.argv.pop(1)
    here = str(Path(__file__).parent)
    site._WORKER = (  # what `coterie join` starts as its worker
        f"import sys; sys.path.insert(0, {here!r}); from misbehaving import work; "
        f"work(sys.argv[1], sys.argv[2], {plan!r})"
    )
    coterie()


if __name__ == "__main__":
    main()
