"""Pieces of a text that grows: nothing that a stop string begins with, and no half of a character."""

from __future__ import annotations

import pytest

from coterie.api.growing import GrowingText


@pytest.mark.parametrize(
    ("stop", "steps", "sent"),
    [
        (("abé",), ["x ", "x a", "x ab", "x ab\ufffd", "x abé", "x abé more"], "x "),
        (("\n→",), ["hi", "hi\n", "hi\n\ufffd", "hi\n→"], "hi"),
        (("→",), ["hi", "hi\n", "hi\n\ufffd", "hi\n→"], "hi\n"),
        (("\n→",), ["hi", "hi\n", "hi\n\ufffd", "hi\né", "hi\né."], "hi\né."),
        ((), ["\ufffd", "é", "é\ufffd"], "é\ufffd"),
    ],
)
def test_a_stop_string_whose_characters_span_tokens_is_not_sent(
    stop: tuple[str, ...], steps: list[str], sent: str
) -> None:
    growing, pieces = GrowingText(stop), []
    for number, whole in enumerate(steps, start=1):
        if growing.stopped:
            break
        pieces.append(growing.grow(whole, last=number == len(steps)))
    assert "".join(pieces) == growing.sent == sent
