"""Describes every key of a config and of a SITE.toml: its type, its default and its meaning."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from enum import Enum

from pydantic import BaseModel

from coterie.config.check import section_in
from coterie.config.deployment import SiteSettings
from coterie.config.sections import DEFAULT_METHOD, Config
from coterie.methods.registry import method_named, methods

Row = tuple[str, str, str, str]  # dotted key, type, default, meaning
_WORDS: dict[object, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "none",
}


def describe_config(method: str | None = None) -> Iterator[Row]:
    """Every key of a config, with the settings of one method or of all.

    Raises :class:`CoterieError` for an unknown method.
    """
    if method is not None:
        method_named(method)
    for name, field in Config.model_fields.items():
        if name != "method":
            yield from _describe(field.annotation, name)
    yield "method.name", "text", value_in_words(DEFAULT_METHOD), "the method: " + ", ".join(methods())
    for known, kind in methods().items():
        if method in (None, known):
            yield from _describe(kind.Settings, f"method[{known}]")


def describe_site() -> Iterator[Row]:
    """Every key of a SITE.toml."""
    for name, field in SiteSettings.model_fields.items():
        yield from _describe(field.annotation, name)


def type_in_words(annotation: object) -> str:
    """A type in the words of TOML: ``tuple[str, ...] | None`` is a list of text, or none.

    A ``Literal`` is its choices: ``float32 | bfloat16``.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin is typing.Annotated:
        return type_in_words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(type_in_words, inner))
    if origin is tuple:
        return f"list of {type_in_words(inner[0]).replace(', or ', ' or ')}"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    return "section"


def value_in_words(value: object) -> str:
    """A default as TOML writes it; ``none``, which TOML does not have, means that the key is left out."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _describe(model: object, path: str) -> Iterator[Row]:
    assert isinstance(model, type), path
    assert issubclass(model, BaseModel), path
    for name, field in model.model_fields.items():
        section, several = section_in(field.annotation)
        if section is not None:
            yield from _describe(section, f"{path}.{name}{'[]' if several else ''}")
        if section is not None and not several:
            continue
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else value_in_words(value)
        yield f"{path}.{name}", type_in_words(field.annotation), default, field.description or ""
