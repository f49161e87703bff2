"""The reference engine: every client of a simulated federation in this process, over one base that is loaded once.

Running one client after another is the reference for all other engines. Where ``[engine]`` sets several clients for a
forward pass, or names several devices, :mod:`.together` runs the clients instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.compute.loading import simulated_workplaces
from coterie.compute.workplace import Steps, Workplace
from coterie.config.sections import Config
from coterie.data.rows import FederatedData
from coterie.data.truncation import Truncation
from coterie.energy import meter_of
from coterie.engines.base import Delivery, Evaluation, Stream
from coterie.engines.batch_size import AutoSize
from coterie.engines.client import LocalClient, client_bank, evaluate_client, train_client
from coterie.engines.encode_once import EncodedOnce
from coterie.engines.store import ClientStates
from coterie.engines.together import Together
from coterie.machine import releasing_memory
from coterie.methods.base import Method
from coterie.types import Bank, BaseSpec, ClientId, ClientInfo, ExportedAs, Instruction


def make(config: Config, federation: FederatedData, folder: Path, root: Path, cache: dict[str, object]) -> LocalEngine:
    """The engine for a run in ``folder``; the base stays in ``cache`` for further runs with the same model."""
    all_workplaces = simulated_workplaces(config, federation, root, cache)
    wanted = config.engine.clients_per_batch
    together = None
    if wanted != 1 or len(all_workplaces) > 1:
        size, auto = (1, AutoSize()) if wanted == "auto" else (wanted, None)
        together = Together(all_workplaces, size, auto, config.train)
    return LocalEngine(all_workplaces[0], federation, ClientStates.of(config, folder), together)


@dataclass(frozen=True)
class LocalEngine:
    """Runs the clients one after another, or hands them to ``together``.

    Instructions and replies go through the codec both ways, as over a network: the bytes are counted as encoded, and
    server and client share no tensor by accident.
    """

    workplace: Workplace
    federation: FederatedData
    states: ClientStates
    together: Together | None = None

    @property
    def spec(self) -> BaseSpec:
        return self.workplace.base.spec

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(client.info for client in self.federation.clients)

    def train(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        limits: Mapping[ClientId, int] | None = None,
    ) -> Stream[Delivery]:
        """Every client's delivery for round ``rnd``, as it comes. A client's failure is its delivery's ``error``.

        Once all have come, the clients' states are on the disk.
        """
        clients, encoded = self._taking_part(instructions), EncodedOnce(instructions)
        if self.together:
            yield from self.together.train(clients, method, instructions, encoded, rnd)
            return
        meter = meter_of(self.workplace.devices)
        for client in releasing_memory(clients):
            blob = encoded.take(client.id)
            yield client.id, train_client(client, method, blob, rnd, meter).delivery(len(blob))

    def evaluate(
        self,
        method: Method,
        instructions: Mapping[ClientId, Instruction],
        rnd: int,
        splits: tuple[str, ...],
        usage: bool = False,
    ) -> Stream[Evaluation]:
        """Every client's scores with the bank that it would start round ``rnd + 1`` with, or that it trained last."""
        clients, encoded = self._taking_part(instructions), EncodedOnce(instructions)
        if self.together:
            yield from self.together.evaluate(clients, method, encoded, rnd, splits, usage)
            return
        for client in releasing_memory(clients):
            outcome = evaluate_client(client, method, encoded.take(client.id), rnd, splits, usage, texts=True)
            yield client.id, outcome.evaluation()

    def banks(
        self, method: Method, instructions: Mapping[ClientId, Instruction], rnd: int, export: ExportedAs = "last"
    ) -> Stream[Bank]:
        """Every client's bank after round ``rnd``, for export."""
        clients, encoded = self._taking_part(instructions), EncodedOnce(instructions)
        for client in clients:
            yield client.id, client_bank(client, method, encoded.take(client.id), rnd)

    def watch(self, report: Callable[[Steps], None]) -> None:
        """Call ``report`` after every optimiser step from now on; with several devices, from a thread for each."""
        for workplace in self.together.workplaces if self.together else (self.workplace,):
            workplace.report = report

    def truncation(self) -> Truncation:
        """What ``[model] max_length`` cuts off the rows of all clients, which are tokenised for it."""
        return self.workplace.truncation(self.federation.clients)

    def restore(self, rnd: int) -> None:
        """Go back to the clients' states after round ``rnd``."""
        self.states.restore(rnd)

    def state_rounds(self, rnd: int) -> Mapping[str, Mapping[ClientId, int]]:
        """From which round each client's state is, after round ``rnd``."""
        return self.states.state_rounds(rnd)

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Delete the clients' states that only rounds before ``rnd`` need, and none of the rounds ``kept_rounds``."""
        self.states.prune(rnd, kept_rounds)

    def close(self) -> None:
        """Do nothing: everything is in this process."""

    def _taking_part(self, instructions: Mapping[ClientId, Instruction]) -> list[LocalClient]:
        here = [LocalClient(self.workplace, data, self.states) for data in self.federation.clients]
        return [client for client in here if client.id in instructions]
