"""A Ray for this process only: closed to others, and stopped afterwards. Imports neither Ray nor Flower."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil

_EXIT_SECONDS = 5.0  # in which Ray's processes may end by themselves
_RAY_ENVIRONMENT = {  # of a Ray that is started here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # as Flower's own command sets it
    "RAY_worker_niceness": "0",  # as every other engine's; Ray's own is 15
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which means: listen only on 127.0.0.1, on every system
    "RAY_AUTH_MODE": "token",  # without one, whoever reaches Ray can run code in it: other users of the machine too
}


@contextmanager
def own_ray(init: dict[str, object]) -> Iterator[dict[str, object]]:
    """The arguments of ``ray.init``.

    Without the address of a cluster they are for a Ray of this process only, in its own folder, and the
    environment is set for it. Raises :class:`ConnectionError` if Ray was imported before that.
    """
    init = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", **init}
    if "address" in init:
        yield init
        return
    if "ray" in sys.modules and "RAY_AUTH_TOKEN" not in os.environ:  # it reads its environment when it is imported
        raise ConnectionError("Ray was imported before it could be closed to others; run this in a new process")
    os.environ.update(_RAY_ENVIRONMENT)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="coterie-", ignore_cleanup_errors=True) as folder:
        yield {**init, "_temp_dir": folder}


@contextmanager
def processes_end() -> Iterator[list[psutil.Process]]:
    """End the processes that are put into the list after the ``with`` block, unless they ran before it."""
    before, started = set(psutil.Process().children(recursive=True)), list[psutil.Process]()
    try:
        yield started
    finally:
        _, alive = psutil.wait_procs([p for p in started if p not in before], timeout=_EXIT_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def kill(started: Iterable[psutil.Process], actor: str) -> None:
    """End Ray's actors of that name, whatever they are doing: whoever called them would wait for them."""
    for process in started:
        with suppress(psutil.NoSuchProcess):
            if any(actor in part for part in process.cmdline()[:1]):
                process.kill()
