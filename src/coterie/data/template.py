"""Prompts made of a row's columns: ``{name}`` is what the column ``name`` holds, ``{{`` and ``}}`` are braces."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def pieces(template: str) -> list[tuple[str, str | None]]:
    """Each text of the template with the column that follows it (None after the last).

    Raises :class:`ValueError` for a brace without its partner, and for a template that names no column.
    """
    try:
        found = list(Formatter().parse(template))
    except ValueError as fault:
        raise ValueError(f"{template!r}: {fault}; write {{{{ and }}}} for braces that name no column") from fault
    for _, column, form, conversion in found:
        if column == "" or form or conversion:
            wrong = (column or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{template!r}: {{{wrong}}} names no column; write {{column}}, and nothing else in braces")
    if all(column is None for _, column, _, _ in found):
        raise ValueError(f"{template!r} names no column, so that all prompts would be the same; write {{text}}, say")
    return [(text, column) for text, column, _, _ in found]


def columns_of(template: str) -> list[str]:
    """The columns that the template names, each once."""
    return list(dict.fromkeys(column for _, column in pieces(template) if column is not None))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with a value for each column that it names."""
    return "".join(text + ("" if column is None else values[column]) for text, column in pieces(template))
