"""Faults of the service itself: what a pass may raise, what its requests get, and what the log says."""

from __future__ import annotations

from coterie.api.jobs import RequestError
from coterie.types import CoterieError

# What a model or a tokenizer may raise. The text of such a fault may quote a request, so it is never shown.
FAULTS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, CoterieError)


def broken() -> RequestError:
    """What a request gets that the service failed on."""
    return RequestError("the service failed on this request; its log says where", 500, "internal_error")


def not_a_number() -> RequestError:
    """What a request gets whose model computes no numbers."""
    return RequestError("the model's output is not a number", 500, "not_a_number")


def where(fault: BaseException) -> str:
    """The type of ``fault`` and where it was raised, without its text."""
    trace = fault.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(fault).__name__}{at}"
