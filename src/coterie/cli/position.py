"""Where a round is: which clients are done, and how far those at work are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coterie.runs.events import ClientDone, ClientEvaluated, ClientSteps, Event, RoundStart
from coterie.types import ClientId


@dataclass
class Position:
    """Follows the events of single clients; anything else is ignored."""

    round: int = 0
    doing: str = "training"
    clients: int = 0
    done: int = 0
    at_work: Sequence[ClientId] = field(default_factory=tuple)
    taken: int = 0
    steps: int = 0

    def __call__(self, event: Event) -> bool:
        """Move on; returns whether the event moved anything."""
        match event:
            case RoundStart():
                self.round, self.doing, self.clients, self.done = event.round, "training", len(event.clients), 0
            case ClientSteps():
                self.at_work, self.taken, self.steps = event.clients, event.taken, event.of
                return True
            case ClientDone():
                self.done += 1
            case ClientEvaluated():
                first = self.doing == "training"
                self.doing, self.clients, self.done = "evaluating", event.of, 1 if first else self.done + 1
            case _:
                return False
        self.at_work = ()
        return True

    @property
    def share(self) -> float:
        """The clients that are done, with fractions of those at work."""
        left = self.clients - self.done
        return self.done + min(left, len(self.at_work)) * self.taken / self.steps if self.at_work else self.done

    @property
    def step(self) -> str:
        """Who is at which step; nothing between clients."""
        if not self.at_work:
            return ""
        others = f" and {len(self.at_work) - 1} more" if len(self.at_work) > 1 else ""
        return f"{self.at_work[0]}{others} at step {self.taken}/{self.steps}"

    def __str__(self) -> str:
        text = f"{self.doing}, {self.done} of {self.clients} clients done"
        return f"{text}, {self.step}" if self.step else text
