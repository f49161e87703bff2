"""Flower's simulation runtime: SuperNodes in this process, whose messages Ray's actors answer."""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from coterie.flower.app import Answer, GridTransport, client_app_of, first_line, read
from coterie.flower.message import Message
from coterie.flower.ray import kill, own_ray, processes_end

_GRID_SECONDS = 30.0  # in which Flower has its Grid ready; Ray starts after that


@dataclass(frozen=True)
class SimulatedTransport(GridTransport):
    """The Grid of a simulation. Raises :class:`ConnectionError` once that has ended."""

    running: Future[None] = field(default_factory=Future)
    open: set[str] = field(default_factory=set)  # tickets without an answer yet
    pause: float = 0.02

    def nodes(self) -> dict[int, str]:
        self._check()
        return super().nodes()

    def send(self, to: Sequence[tuple[int, str, Message]], ttl: float, group: str) -> list[str | None]:
        tickets = super().send(to, ttl, group)
        self.open.update(ticket for ticket in tickets if ticket)
        return tickets

    def receive(self, tickets: Mapping[str, int]) -> list[tuple[str, Message | str]]:
        self._check()
        if not tickets:
            return []
        # All at once: the actors are this machine's own.
        answers = [(m.metadata.reply_to_message_id, read(m)) for m in self.grid.pull_messages(list(tickets))]
        self.open.difference_update(ticket for ticket, _ in answers)
        return answers

    def _check(self) -> None:
        if self.running.done():
            raise ConnectionError(f"Flower's simulation ended: {_first_cause(self.running.exception())}")


def _first_cause(fault: BaseException | None) -> str:
    while fault is not None and fault.__cause__ is not None:
        fault = fault.__cause__
    return first_line(str(fault)) if fault is not None else "for no known reason"


@contextmanager
def simulation(
    answer: Answer, nodes: int, resources: Mapping[str, float], ray: Mapping[str, Any]
) -> Iterator[SimulatedTransport]:
    """Flower's simulation runtime for a ``with`` block: ``nodes`` SuperNodes whose messages Ray's actors ``answer``.

    ``resources`` are those of one actor, ``ray`` is for ``ray.init``. Flower runs in its own thread and lends its
    Grid to this one. At the end all processes that were started are gone: actors that are still working are killed.
    Raises :class:`ConnectionError` if it does not start.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # every fault comes back as an answer
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    grids: queue.SimpleQueue[Grid] = queue.SimpleQueue()
    with own_ray(dict(ray)) as init, processes_end() as started, ThreadPoolExecutor(1) as thread:
        backend = {"client_resources": dict(resources), "init_args": init}
        over = threading.Event()
        running = thread.submit(_run, answer, nodes, backend, grids, over)
        running.add_done_callback(lambda _: over.set())
        working = True
        try:
            transport = SimulatedTransport(_grid_of(grids, running), running=running)
            while len(transport.nodes()) < nodes:
                time.sleep(transport.pause)
            yield transport
            working = bool(transport.open)
        finally:
            started += psutil.Process().children(recursive=True)
            over.set()
            if working:
                kill(started, "ray::ClientAppActor")


def _run(
    answer: Answer, nodes: int, backend: Mapping[str, Any], grids: queue.SimpleQueue[Grid], over: threading.Event
) -> None:
    """Run the simulation, with a ServerApp that passes on its Grid and waits until ``over`` is set."""
    from flwr.simulation import run_simulation

    app = ServerApp()

    @app.main()
    def lend(grid: Grid, context: Context) -> None:
        grids.put(grid)
        over.wait()

    run_simulation(app, client_app_of(answer), nodes, backend_config=dict(backend))


def _grid_of(grids: queue.SimpleQueue[Grid], running: Future[None]) -> Grid:
    try:
        return grids.get(timeout=_GRID_SECONDS)
    except queue.Empty as fault:
        reason = _first_cause(running.exception()) if running.done() else f"no Grid after {_GRID_SECONDS:g} s"
        raise ConnectionError(f"Flower's simulation did not start: {reason}") from fault
