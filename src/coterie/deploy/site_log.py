"""What a site says of itself: to its own log, and to the server. Never a row, a label or a message of a library."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType

from coterie.types import CoterieError, PrivateError

log = logging.getLogger("coterie.site")
_MAX_BYTES, _FILES = 5_000_000, 3


class ModelError(PrivateError):
    """The base cannot be loaded; its text may hold paths and what libraries said."""

    public = "this site cannot load its model; `coterie site check` there says why"


@contextmanager
def private_model_faults() -> Iterator[None]:
    """Turn faults of the base into :class:`ModelError`."""
    try:
        yield
    except (CoterieError, OSError) as fault:
        raise ModelError(str(fault)) from fault


def public_text(fault: Exception) -> str:
    """What the server is told of a fault: nothing that quotes rows or names paths. The log says where it happened."""
    if not isinstance(fault, PrivateError):
        return str(fault)
    log.warning("%s at %s", type(fault).__name__, _where(fault))
    return fault.public


def write_log(folder: Path) -> None:
    """Log to ``site.log`` in ``folder`` from here on, also what this process dies of."""
    handler = RotatingFileHandler(folder / "site.log", maxBytes=_MAX_BYTES, backupCount=_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    sys.excepthook = log_without_text


def log_without_text(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Log where the process failed, but not the fault's text: that may quote a row."""
    log.error("the worker failed with %s at %s", kind.__name__, _where(fault))


def _where(fault: BaseException) -> str:
    """The files and lines that a fault passed through, the innermost first."""
    frames = traceback.extract_tb(fault.__traceback__)
    return " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
