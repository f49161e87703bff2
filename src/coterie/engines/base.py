"""The Engine protocol: what the rounds need from whatever runs the clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from coterie.compute.workplace import Steps
from coterie.data.truncation import Truncation
from coterie.energy import Energy
from coterie.methods.base import Method
from coterie.requests import Observed, Sample
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, ExportedAs, Instruction, Reply

T = TypeVar("T")
Stream = Generator[tuple[ClientId, T], None, None]  # one by one; closing it drops what is not done


@dataclass(frozen=True)
class Delivery:
    """The outcome of one client's round: a reply, or the reason why there is none; bytes as encoded, and seconds.

    Clients that are simulated together each take an equal part of the time. ``note``: what the user should know.
    ``energy``: what the round took, if that is known.
    """

    reply: Reply | None
    error: str | None
    bytes_down: int
    bytes_up: int
    seconds: float
    note: str | None = None
    energy: Energy | None = None


SAMPLES = 3  # generated texts of a client that a simulation keeps for its report


@dataclass(frozen=True)
class Evaluation:
    """A client's metrics by split, ``loss`` among them, and on request how its tokens use the experts.

    ``note``: what the user should know. ``samples``: generated texts, in simulations only; a site never sends them.
    """

    scores: Mapping[str, Mapping[str, float]]
    observed: Observed | None = None
    note: str | None = None
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Needs:
    """Libraries that an engine imports beside Coterie's own dependencies, and the command that installs them."""

    libraries: tuple[str, ...] = ()
    install: str = ""


class Engine(Protocol):
    """Runs the clients: it has their data, their states, and the compute that answers their programs."""

    @property
    def spec(self) -> BaseSpec: ...

    @property
    def clients(self) -> tuple[ClientInfo, ...]: ...

    def train(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        limits: Mapping[ClientId, int] | None = None,
    ) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``.

        ``limits`` are the bytes that their encoded replies may have: an engine whose clients run on other
        organisations' machines rejects larger replies.
        """
        ...

    def evaluate(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]: ...

    def banks(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        export: ExportedAs = "last",
    ) -> Stream[Bank]:
        """Every client's bank after round ``rnd``. Sites write their own to their disks, as what ``export`` says."""
        ...

    def watch(self, report: Callable[[Steps], None]) -> None:
        """Call ``report`` after every optimiser step from now on, from whatever thread took it; nothing where clients
        train in other processes."""
        ...

    def truncation(self) -> Truncation:
        """What ``[model] max_length`` cuts off the rows of all clients; nothing where they are on others' machines."""
        ...

    def restore(self, rnd: int) -> None: ...

    def state_rounds(self, rnd: int) -> Mapping[str, Mapping[ClientId, int]]: ...

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Delete the clients' states that neither rounds from ``rnd`` on need nor the rounds ``kept_rounds``."""
        ...

    def close(self) -> None:
        """End the processes that the engine started."""
