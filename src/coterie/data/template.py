"""Prompts made from a row's columns: ``{name}`` is the value of the column ``name``; ``{{`` and ``}}`` are braces."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def pieces(template: str) -> list[tuple[str, str | None]]:
    """Each text of the template with the column that follows it (None after the last).

    Raises :class:`ValueError` for a brace without its partner, and for a template that names no column.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as fault:
        raise ValueError(f"{template!r}: {fault}; write {{{{ and }}}} for braces") from fault
    for _, column, form, conversion in parts:
        if column == "" or form or conversion:
            wrong = (column or "") + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{template!r}: {{{wrong}}} is not a column; put only a column's name in braces")
    if all(column is None for _, column, _, _ in parts):
        raise ValueError(f"{template!r} names no column, so all prompts would be the same; use one, as in {{text}}")
    return [(text, column) for text, column, _, _ in parts]


def columns_of(template: str) -> list[str]:
    """The columns that the template names, each once."""
    return list(dict.fromkeys(column for _, column in pieces(template) if column is not None))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with a value for each column that it names."""
    return "".join(text + ("" if column is None else values[column]) for text, column in pieces(template))
