"""What a site writes to its log and tells the server about itself: never a row, a label or a library's message."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from types import TracebackType

from coterie.types import CoterieError, PrivateError

log = logging.getLogger("coterie.site")
_FILE, _FORMAT = "site.log", "%(asctime)s %(levelname)s %(message)s"
_MAX_BYTES, _FILES = 5_000_000, 3


class ModelError(PrivateError):
    """The base cannot be loaded; the text may contain paths and messages of libraries."""

    public = "this site cannot load its model; run `coterie site check` there to see why"


@contextmanager
def private_model_faults() -> Iterator[None]:
    """Turn faults of the base into :class:`ModelError`."""
    try:
        yield
    except (CoterieError, OSError) as fault:
        raise ModelError(str(fault)) from fault


def public_text(fault: Exception) -> str:
    """The text about a fault that the server gets: it quotes no rows and names no paths. The log says where it was."""
    if not isinstance(fault, PrivateError):
        return str(fault)
    log.warning("%s at %s", type(fault).__name__, _where(fault))
    return fault.public


def disk_text(fault: OSError) -> str:
    """The text about a file of this site that could not be read or written: a full disk, or what the system says."""
    log.error("%s (%s) at %s", fault.strerror or type(fault).__name__, fault.filename or "no file named", _where(fault))
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the site's disk is full: free some space there"
    return (
        f"the site cannot read or write one of its files ({fault.strerror or type(fault).__name__}): see site.log there"
    )


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Within a ``with`` block, log to the terminal and to ``site.log`` in ``folder``, beside the worker."""
    file, terminal = WatchedFileHandler(folder / _FILE), logging.StreamHandler()
    file.setFormatter(logging.Formatter(_FORMAT))
    for handler in (file, terminal):
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, terminal):
            log.removeHandler(handler)
            handler.close()


def write_log(folder: Path) -> None:
    """Log to ``site.log`` in ``folder`` from now on, including why this process dies."""
    handler = RotatingFileHandler(folder / _FILE, maxBytes=_MAX_BYTES, backupCount=_FILES)
    handler.setFormatter(logging.Formatter(_FORMAT))
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
