"""The real service on loopback, in a thread: uvicorn on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from coterie.api.server import Ready, Service, ready


@contextmanager
def running(service: Service) -> Iterator[Ready]:
    with ready(service) as prepared:
        thread = threading.Thread(target=prepared.run, daemon=True)
        thread.start()
        while not prepared.server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield prepared
        finally:
            prepared.server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
