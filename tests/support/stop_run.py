"""Runs that stop at an event, as an interrupted one does, so that a test can resume them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coterie.runs.events import Event


class StoppedError(Exception):
    """Raised inside a run by :func:`stop_run`."""


def stop_run(run: Callable[..., Any], *args: Any, when: Callable[[Event], bool], **more: Any) -> None:
    """Call ``run`` until an event for which ``when`` holds; fails if there is none."""

    def stop(event: Event) -> None:
        if when(event):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(*args, listen=stop, **more)
