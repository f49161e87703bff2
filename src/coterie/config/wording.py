"""Types and values of settings in the words of who writes TOML."""

from __future__ import annotations

import json
import types
import typing
from enum import Enum
from typing import Any

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "none"}


def type_in_words(annotation: Any) -> str:
    """``tuple[str, ...] | None`` is a list of text, or none; a ``Literal`` its choices: ``float32 | bfloat16``."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(type_in_words, inner))
    if origin is tuple:
        return f"list of {type_in_words(inner[0]).replace(', or ', ' or ')}"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    return "section"


def value_in_words(value: Any) -> str:
    """A default as TOML has it; ``none``, which TOML has not, is a key left out."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
