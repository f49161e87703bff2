"""Checks settings against their model, and says what is wrong in the words of their file."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from coterie.text import check_pairs, reason_of
from coterie.types import CoterieError

M = TypeVar("M", bound=BaseModel)
_MOST = 3  # faults named in one message


class _Fault(NamedTuple):
    """One of pydantic's errors: its kind, where it is (names and positions in lists), its text, the value there."""

    kind: str
    loc: tuple[int | str, ...]
    text: str
    value: object


def checked(model: type[M], raw: Mapping[str, object], path: str) -> M:
    """``raw`` as a ``model``. ``path`` is the dotted name of the section that it is, "" for a whole file.

    Raises :class:`CoterieError` for wrong values and for unknown keys, with the nearest known one.
    """
    try:
        return model.model_validate_json(as_json(raw))  # JSON lists become tuples, and "4" is still not a number
    except ValidationError as error:
        faults = [_Fault(e["type"], e["loc"], e["msg"], e["input"]) for e in error.errors()]
        # Where text or a section is allowed, pydantic also says of a wrong section that it is not text.
        faults = [f for f in faults if not (f.kind == "string_type" and isinstance(f.value, dict))] or faults
        raise CoterieError("; ".join(_message(model, fault, path) for fault in faults[:_MOST])) from error


def as_json(raw: Mapping[str, object]) -> str:
    """``raw`` as JSON; a date or time of TOML, which no key takes, as text.

    Raises :class:`CoterieError` for a number with thousands of digits, and for a text that is not UTF-8.
    """
    try:
        text = json.dumps(raw, default=str)
        check_pairs(json.dumps(raw, default=str, ensure_ascii=False))
        return text
    except ValueError as fault:
        raise CoterieError(f"the config cannot be read: {reason_of(fault)}") from fault


def section_in(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The model of the section that a type holds, and whether the type is a list of such sections.

    The section may be the type itself, or a part of a union or a tuple. None where the type has no section.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    inner = (section_in(part)[0] for part in typing.get_args(annotation))
    return next((section for section in inner if section is not None), None), typing.get_origin(annotation) is tuple


def _message(model: type[BaseModel] | None, fault: _Fault, path: str) -> str:
    unknown = fault.kind == "extra_forbidden"
    parts = [path] if path else []
    for depth, part in enumerate(fault.loc, start=1):
        field = model.model_fields.get(str(part)) if model else None
        model = section_in(field.annotation)[0] if field else model
        # The rest are names that pydantic made up for the members of a union.
        if field or isinstance(part, int) or (unknown and depth == len(fault.loc)):
            parts.append(str(part))
    *sections, key = parts
    where = f"[{'.'.join(sections)}] " if sections else ""
    if unknown:
        return f"{where}unknown key {key!r}; {_hint(key, list(model.model_fields) if model else [])}"
    value = "" if isinstance(fault.value, dict) else f" (found {fault.value!r})"
    return f"{where}{key}: {fault.text.removeprefix('Value error, ')}{value}"


def _hint(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known) or 'none'}"
