"""What a site answered: a value, or the reason why there is none."""

from __future__ import annotations

from typing import TypeVar

from coterie import codec
from coterie.flower.message import Message
from coterie.text import plain_text

T = TypeVar("T")
Outcome = tuple[T, None] | tuple[None, str]  # a value, or the reason why there is none


def decoded(kind: type[T], body: bytes) -> Outcome[T]:
    """The value of a site's answer, or why it cannot be read."""
    try:
        return codec.decode(kind, body), None
    except codec.CodecError as fault:
        return None, plain_text(f"the reply cannot be read: {str(fault)[:300]}")


def answered(kind: type[T], answer: Message | str) -> Outcome[T]:
    """The value of a site's answer; or the transport's, the site's or our own reason why there is none."""
    if isinstance(answer, str):
        return None, plain_text(answer)
    if error := error_in(answer):
        return None, error
    return decoded(kind, answer.body)


def error_in(answer: Message) -> str | None:
    """Why a site gives no answer, in the site's words."""
    error = answer.head.get("error")
    if error is None:
        return None
    return (plain_text(error) if isinstance(error, str) else "") or "an error without a text"
