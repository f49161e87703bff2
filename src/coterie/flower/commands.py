"""Flower's own programs, each with one change: the commands that start a SuperLink, a SuperNode and a ClientApp."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coterie.flower.app import client_app
from coterie.flower.refused import RefusedKey, RefusedKeys

_FOR_SITES = ("/v1/fleet/", "/health")
_EAGER = 120.0  # seconds after an answer during which a SuperNode looks for the next message more often
_EAGER_PAUSE = 0.5  # seconds between two checks then


def superlink_command() -> None:
    """Flower's ``flower-superlink``, with its control port closed to other machines.

    Flower serves its control and its runtime on the port of the sites: whoever holds the CA certificate alone could
    register nodes and submit code. Here a request for either that does not come from this machine is refused.
    """
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(LocalOnly), *others())
    _note_refused_keys(RefusedKeys(Path(os.environ["FLWR_HOME"])))
    flower_superlink()


def _note_refused_keys(book: RefusedKeys) -> None:
    """Let Flower note in ``book`` whom it refuses for its key: the server's run never hears of these nodes."""
    from flwr.supercore.error import FlowerError
    from flwr.superlink.servicer.fleet import fleet_handlers

    activate = fleet_handlers.activate_node

    def activate_node(request: Any, state: Any) -> Any:
        try:
            return activate(request, state)
        except FlowerError:
            known = state.get_node_id_by_public_key(request.public_key) is not None
            book.add(RefusedKey(hashlib.sha256(request.public_key).hexdigest(), known))
            raise

    fleet_handlers.activate_node = activate_node


@dataclass(frozen=True)
class LocalOnly:
    """Refuses, with 403, what is neither for the sites nor from this machine. An ASGI middleware."""

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


def clientapp_command() -> None:
    """Flower's ``flwr-clientapp`` with the ClientApp of this installation, whatever code the server's app brought.

    Flower would install and run what the server sent. A site runs only what is installed there.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    for name in ("install_from_fab", "get_load_client_app_fn"):
        if not hasattr(runtime, name):
            raise ImportError(
                f"this Flower has no {name}, which is needed to keep the server's code out; install flwr==1.41.0"
            )
    runtime.install_from_fab = lambda *args, **kwargs: None  # type: ignore[assignment, attr-defined]
    runtime.get_load_client_app_fn = lambda **kwargs: lambda *args: client_app  # type: ignore[attr-defined]
    flwr_clientapp()


def supernode_command() -> None:
    """Flower's ``flower-supernode``, which for a while after an answer looks for the next message more often.

    Flower looks every three seconds, so a site's next message waits about two seconds at the server; at half a second
    all the time, fifty sites would keep a SuperLink busy. If this Flower's internals differ, they stay as they are:
    only speed depends on this.
    """
    from flwr.supernode import start_client_internal as runtime
    from flwr.supernode.cli import flower_supernode

    if not (hasattr(runtime, "_pull_and_store_message") and hasattr(runtime, "time")):
        flower_supernode()
        return
    pull, last, answering = runtime._pull_and_store_message, -_EAGER, False

    def pull_message(**kwargs: Any) -> int | None:
        nonlocal last, answering
        if answering:  # the answer to the previous message has just been sent
            last = time.monotonic()
        message = pull(**kwargs)
        answering = message is not None
        return message

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, _EAGER_PAUSE) if time.monotonic() - last < _EAGER else seconds)

    runtime._pull_and_store_message, runtime.time = pull_message, SimpleNamespace(sleep=sleep)  # type: ignore[assignment, attr-defined]
    flower_supernode()
