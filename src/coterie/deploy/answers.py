"""What came back from a site: a value, or why there is none."""

from __future__ import annotations

from typing import Any

from coterie import codec
from coterie.engines.checks import plain_text
from coterie.flower.message import Message


def decoded(kind: type[Any], blob: bytes) -> tuple[Any, str | None]:
    """What a site's blob says, or why it cannot be read."""
    try:
        return codec.decode(kind, blob), None
    except codec.CodecError as fault:
        return None, plain_text(f"the reply cannot be read: {str(fault)[:300]}")


def answered(kind: type[Any], answer: Message | str) -> tuple[Any, str | None]:
    """What a site answered; or the transport's, the site's or our own reason why there is nothing."""
    if isinstance(answer, str):
        return None, plain_text(answer)
    if error := error_in(answer):
        return None, error
    return decoded(kind, answer.body)


def error_in(answer: Message) -> str | None:
    """Why a site gives no answer, in its own words."""
    error = answer.head.get("error")
    if error is None:
        return None
    return (plain_text(error) if isinstance(error, str) else "") or "an error without a text"
