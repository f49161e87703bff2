"""The one file that knows Flower: messages over its raw Grid, a site's ClientApp, its simulation.

A message holds one parcel: the blob of the codec in one array of bytes, which is bit for bit what was sent whatever
the dtypes in it, and the head as JSON text. Nothing here imports torch when the module is loaded: Flower starts a
process with the ClientApp for every single message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is loaded

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from coterie.flower.message import KINDS, BrokenParcelError, GoneError, Parcel, hand_over, head_of
from coterie.flower.ray import ended, kill, own_ray

_FOR_SITES = ("/v1/fleet/", "/health")
_WORKER_PAUSE = 1.0  # seconds between tries to reach a worker that is being started again
_WORKER_DEATHS = 3  # of one message: it may have been ended by something else
_EAGER, _LOOK = 120.0, 0.5  # seconds after an answer in which a SuperNode looks for the next, and how often
_LEND_SECONDS = 30.0  # in which Flower has its Grid ready; Ray starts after that


def pack(parcel: Parcel) -> RecordDict:
    """A parcel as the content of a message."""
    array = Array(dtype="uint8", shape=(len(parcel.blob),), stype="safetensors", data=parcel.blob)
    return RecordDict({"blob": ArrayRecord({"blob": array}), "head": ConfigRecord({"json": json.dumps(parcel.head)})})


def unpack(content: RecordDict) -> Parcel:
    """The parcel in the content of a message. Raises :class:`BrokenParcelError`."""
    blobs, heads = content.array_records, content.config_records
    if set(blobs) != {"blob"} or set(heads) != {"head"} or set(blobs["blob"]) != {"blob"}:
        raise BrokenParcelError("it does not hold a head and a blob, and these only")
    text = heads["head"].get("json")
    if not isinstance(text, str):
        raise BrokenParcelError("its head is no text")
    return Parcel(head_of(text), blobs["blob"]["blob"].data)


# the server ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridTransport:
    """A Grid as :class:`coterie.flower.message.Transport`."""

    grid: Grid
    pause: float = 0.5

    def nodes(self) -> dict[int, str]:
        """The nodes that are there, each with the SHA-256 of its public key ('' where none was shown)."""
        found = self.grid.get_nodes()
        return {n.node_id: hashlib.sha256(n.public_key).hexdigest() if n.public_key else "" for n in found}

    def send(self, to: Sequence[tuple[int, str, Parcel]], ttl: float, group: str) -> list[str | None]:
        """A ticket per (node, kind, parcel), None for one that Flower did not take."""
        messages = [Message(pack(p), dst_node_id=n, message_type=k, ttl=ttl, group_id=group) for n, k, p in to]
        tickets = [ticket or None for ticket in self.grid.push_messages(messages)] if messages else []
        return tickets if len(tickets) == len(to) else [None] * len(to)

    def receive(self, tickets: Collection[str]) -> list[tuple[str, Parcel | str]]:
        """What has come since: with its ticket an answer, or the reason why there will be none."""
        if not tickets:
            return []
        # By the ticket and not by the sender: of an error for a dead node the sender is the SuperLink.
        return [(m.metadata.reply_to_message_id, _read(m)) for m in self.grid.pull_messages(list(tickets))]


def _read(message: Message) -> Parcel | str:
    if message.has_error():
        return f"Flower says {message.error.code}: {_first_line(message.error.reason)}"
    try:
        return unpack(message.content)
    except BrokenParcelError as fault:
        return Parcel({"error": f"the reply cannot be read: {fault}"})  # the site's fault, and no reason to ask again


def _first_line(text: str | None) -> str:
    return (text or "no reason given").strip().splitlines()[0][:300]


def server_app(main: Callable[[GridTransport, Mapping[str, Any]], None]) -> ServerApp:
    """A ServerApp that calls ``main`` with the transport and the run's config."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridTransport(grid), context.run_config)

    return app


def superlink_command() -> None:
    """Flower's ``flower-superlink``, but only the sites' part of it answers other machines.

    Its control and its runtime share one port with the sites' part: whoever holds the CA certificate alone could
    register nodes and submit code. Here a request for either that does not come from this machine is refused.
    """
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(_LocalOnly), *others())
    flower_superlink()


@dataclass(frozen=True)
class _LocalOnly:
    """Refuses, with 403, what is neither for the fleet nor from this machine. An ASGI middleware."""

    app: Callable[..., Awaitable[None]]

    async def __call__(self, scope: Mapping[str, Any], get: Any, put: Any) -> None:
        kind, path = scope["type"], scope.get("path", "")
        host = (scope.get("client") or ("",))[0]
        local = host in ("127.0.0.1", "::1") or host.startswith(("127.", "::ffff:127."))
        if kind == "lifespan" or local or (kind == "http" and path.startswith(_FOR_SITES)):
            await self.app(scope, get, put)
        elif kind == "http":
            await put({"type": "http.response.start", "status": 403, "headers": []})
            await put({"type": "http.response.body", "body": b"only from the server's own machine"})


# a site --------------------------------------------------------------------------------------------------------------


def client_app_of(answer: Callable[[Parcel, Context, float], Parcel]) -> ClientApp:
    """A ClientApp that answers every kind of message with ``answer`` (parcel, context, seconds left)."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        left = message.metadata.created_at + message.metadata.ttl - time.time()
        try:
            reply = answer(unpack(message.content), context, left)
        except BrokenParcelError as fault:
            reply = Parcel({"error": f"the message cannot be read: {fault}"})
        return Message(pack(reply), reply_to=message)

    for kind in KINDS:
        category, _, action = kind.partition(".")
        register = getattr(app, category)
        (register(action) if action else register())(handle)
    return app


def _to_worker(parcel: Parcel, context: Context, left: float) -> Parcel:
    """The worker's answer; asks again for as long as there is time, as a worker that died is started again.

    A worker that died of this very message is handed it three times.
    """
    deaths, path = 0, str(context.node_config.get("socket", ""))
    end = time.monotonic() + min(left, float(parcel.head.get("patience", left)))
    while True:
        try:
            return hand_over(path, parcel, max(0.1, end - time.monotonic()))
        except TimeoutError:
            return Parcel({"error": "the site's worker was not done in time"})
        except PermissionError:
            return Parcel({"error": "the site's worker socket is another user's"})
        except BrokenParcelError as fault:
            return Parcel({"error": f"the worker's answer cannot be read: {fault}"})
        except OSError as fault:
            deaths += isinstance(fault, GoneError)
            if deaths == _WORKER_DEATHS:
                return Parcel({"error": "the site's worker died of this message; see site.log there"})
            if time.monotonic() + _WORKER_PAUSE > end:
                return Parcel({"error": f"the site's worker cannot be reached ({fault.strerror or fault})"})
            time.sleep(_WORKER_PAUSE)


client_app = client_app_of(_to_worker)


def clientapp_command() -> None:
    """Flower's ``flwr-clientapp`` with the ClientApp of this installation, whatever code the server's app brought.

    Flower would install and run what the server sent. A site runs what its own people installed, and nothing else.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    for name in ("install_from_fab", "get_load_client_app_fn"):
        if not hasattr(runtime, name):
            raise ImportError(f"this Flower has no {name} to keep the server's code out with; install flwr==1.41.0")
    runtime.install_from_fab = lambda *args, **kwargs: None  # type: ignore[assignment, attr-defined]
    runtime.get_load_client_app_fn = lambda **kwargs: lambda *args: client_app  # type: ignore[attr-defined]
    flwr_clientapp()


def supernode_command() -> None:
    """Flower's ``flower-supernode``, but for a while after an answer it looks for the next message more often.

    Flower looks every three seconds, so that a site's next message lies about two seconds at the server; at half a
    second all the time, fifty sites would keep a SuperLink busy with that. Where this Flower is another one inside,
    it is left as it is: nothing rests on it but time.
    """
    from flwr.supernode import start_client_internal as runtime
    from flwr.supernode.cli import flower_supernode

    if not (hasattr(runtime, "_pull_and_store_message") and hasattr(runtime, "time")):
        flower_supernode()
        return
    pull, last, answering = runtime._pull_and_store_message, -_EAGER, False

    def pulled(**kwargs: Any) -> int | None:
        nonlocal last, answering
        if answering:  # the answer to the one before has just gone out
            last = time.monotonic()
        found = pull(**kwargs)
        answering = found is not None
        return found

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, _LOOK) if time.monotonic() - last < _EAGER else seconds)

    runtime._pull_and_store_message, runtime.time = pulled, SimpleNamespace(sleep=sleep)  # type: ignore[assignment, attr-defined]
    flower_supernode()


# simulation ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedTransport(GridTransport):
    """The Grid of a simulation. Raises :class:`ConnectionError` once that has ended."""

    running: Future[None] = field(default_factory=Future)
    open: set[str] = field(default_factory=set)  # tickets without an answer yet
    pause: float = 0.02

    def nodes(self) -> dict[int, str]:
        self._check()
        return super().nodes()

    def send(self, to: Sequence[tuple[int, str, Parcel]], ttl: float, group: str) -> list[str | None]:
        tickets = super().send(to, ttl, group)
        self.open.update(ticket for ticket in tickets if ticket)
        return tickets

    def receive(self, tickets: Collection[str]) -> list[tuple[str, Parcel | str]]:
        self._check()
        found = super().receive(tickets)
        self.open.difference_update(ticket for ticket, _ in found)
        return found

    def _check(self) -> None:
        if self.running.done():
            raise ConnectionError(f"Flower's simulation ended: {_root_of(self.running.exception())}")


def _root_of(fault: BaseException | None) -> str:
    while fault is not None and fault.__cause__ is not None:
        fault = fault.__cause__
    return _first_line(str(fault)) if fault is not None else "nobody knows why"


@contextmanager
def simulation(
    answer: Callable[[Parcel, Context, float], Parcel],
    nodes: int,
    resources: Mapping[str, float],
    ray: Mapping[str, Any],
) -> Iterator[SimulatedTransport]:
    """Flower's simulation runtime for a ``with`` block: ``nodes`` SuperNodes whose messages Ray's actors ``answer``.

    ``resources`` are those of one actor, ``ray`` is for ``ray.init``. Flower runs in a thread of its own and lends its
    Grid to this one. At the end all processes that were started are gone: actors that are at work are killed.
    Raises :class:`ConnectionError` where it does not start.
    """
    from flwr.simulation import run_simulation

    lent: queue.SimpleQueue[Grid] = queue.SimpleQueue()
    over = threading.Event()

    def lend(grid: Grid, context: Context) -> None:
        lent.put(grid)
        over.wait()

    app = ServerApp()
    app.main()(lend)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # every fault comes back as an answer
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    with own_ray(dict(ray)) as init, ended() as started, ThreadPoolExecutor(1) as thread:
        backend = {"client_resources": dict(resources), "init_args": init}
        running = thread.submit(run_simulation, app, client_app_of(answer), nodes, backend_config=backend)
        running.add_done_callback(lambda _: over.set())
        try:
            transport = SimulatedTransport(_grid_of(lent, running), running=running)
            while len(transport.nodes()) < nodes:
                time.sleep(transport.pause)
            yield transport
            at_work = bool(transport.open)
        except BaseException:
            at_work = True
            raise
        finally:
            started += psutil.Process().children(recursive=True)
            over.set()
            if at_work:
                kill(started, "ray::ClientAppActor")


def _grid_of(lent: queue.SimpleQueue[Grid], running: Future[None]) -> Grid:
    try:
        return lent.get(timeout=_LEND_SECONDS)
    except queue.Empty as fault:
        why = _root_of(running.exception()) if running.done() else f"no Grid after {_LEND_SECONDS:g} s"
        raise ConnectionError(f"Flower's simulation did not start: {why}") from fault
