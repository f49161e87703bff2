"""Reads a config or a SITE.toml: the TOML file, the overrides of the command line, the checks."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from coterie.config.check import as_json, checked
from coterie.config.deployment import SiteSettings
from coterie.config.sections import DEFAULT_METHOD, Config
from coterie.methods.registry import method_named, methods
from coterie.text import reason_of
from coterie.types import CoterieError

Raw = Mapping[str, object]  # the content of a TOML file, unchecked
_DEEPEST = 8  # sections inside each other; settings need four
_MOST_DOTS = 1000  # in a line, outside quotes
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'')


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a TOML file, with ``section.key=value`` overrides.

    Raises :class:`CoterieError` for a missing file, bad TOML, an unknown key (names the nearest) or a wrong value.
    """
    return check_config(override(load_raw(Path(path)), overrides))


def load_site(path: Path) -> SiteSettings:
    """The checked SITE.toml at ``path``. Raises :class:`CoterieError` as :func:`load_config` does."""
    return checked(SiteSettings, load_raw(path), "")


def load_raw(path: Path) -> dict[str, object]:
    """The unchecked content of a TOML file. Raises :class:`CoterieError` for a missing file and for bad TOML."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_dots(text)
        return tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError) as fault:
        raise CoterieError(f"there is no config file {path}") from fault
    except (ValueError, RecursionError) as fault:  # TOML or UTF-8
        raise CoterieError(f"{path} is not valid TOML: {reason_of(fault)}") from fault


def check_config(raw: Raw) -> Config:
    """The checked config of nested mappings; see :func:`load_config`.

    ``[methods.NAME]`` holds the settings of a method by name, for a file that several methods share. Those of the
    method in use apply; keys of ``[method]`` itself take precedence.
    """
    raw = _with_tracking(raw)
    several, named = section_of(raw, "methods"), section_of(raw, "method")
    for name in several:
        _check_owner(name, section_of(several, name), f"methods.{name}")
        checked(method_named(name).Settings, section_of(several, name), f"methods.{name}")
    chosen = method_name(raw)
    _check_owner(chosen, named, "method")
    rest = {name: value for name, value in raw.items() if name != "methods"}
    config = checked(Config, {**rest, "method": {**section_of(several, chosen), **named, "name": chosen}}, "")
    _check_ranks(config)
    resolved = config.method_settings().model_dump(mode="json")
    return config.model_copy(update={"method": {"name": chosen, **resolved}})


def _check_owner(method: str, settings: Mapping[str, object], where: str) -> None:
    """Raises :class:`CoterieError` for a setting in the section ``where`` that only other methods have."""
    for key in settings.keys() - {"name"} - method_named(method).Settings.model_fields.keys():
        owners = [name for name, kind in methods().items() if key in kind.Settings.model_fields]
        if owners:
            others = f"[methods.{owners[0]}]" if len(owners) == 1 else "the [methods.NAME] of the method it is for"
            raise CoterieError(
                f"[{where}] {key!r} is a setting of {', '.join(owners)}, and not of {method}; move it to {others}, "
                "where it applies to that method alone"
            )


def _check_ranks(config: Config) -> None:
    """Raises :class:`CoterieError` for ranks by client with a method whose clients have one rank."""
    if config.lora.ranks and not method_named(config.method_name).mixed_ranks:
        mixed = ", ".join(name for name, kind in methods().items() if kind.mixed_ranks)
        raise CoterieError(
            f"[lora] ranks: all clients of {config.method_name} have the same rank; leave ranks out, or use one that "
            f"allows different ones: {mixed}"
        )


def method_name(raw: Raw) -> str:
    """The method that an unchecked config runs: ``[method] name``, or the default."""
    return str(section_of(raw, "method").get("name", DEFAULT_METHOD))


def section_of(raw: Raw, name: str) -> dict[str, object]:
    """A section of an unchecked config, empty where there is none.

    Raises :class:`CoterieError` where the key holds something other than a section.
    """
    section = raw.get(name, {})
    if not isinstance(section, dict):
        raise CoterieError(f"{name} = {section!r} in the config: {name} must be a section")
    return section


def override(raw: Raw, overrides: Sequence[str]) -> dict[str, object]:
    """``raw`` with every ``section.key=value`` set. A value is TOML, or plain text where it is not valid TOML.

    Raises :class:`CoterieError` for an override of another form.
    """
    result: dict[str, object] = json.loads(as_json(raw))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or "." not in path:
            raise CoterieError(f"--set {text!r} is not of the form section.key=value")
        *sections, key = path.strip().split(".")
        if len(sections) > _DEEPEST:
            raise CoterieError(f"--set {text[:40]!r}...: no setting is nested that deeply")
        inner = result
        for section in sections:
            below = inner.setdefault(section, {})
            if not isinstance(below, dict):
                raise CoterieError(f"--set {text!r}: {section} is not a section")
            inner = below
        try:
            inner[key] = _value(value)
        except (ValueError, RecursionError) as fault:
            raise CoterieError(f"--set {path.strip()}={value.strip()[:40]}...: {reason_of(fault)}") from fault
    return result


def differences(old: Raw, new: Raw) -> list[str]:
    """The dotted keys in which two configs differ."""
    before, after = dict(flat(old)), dict(flat(new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _with_tracking(raw: Raw) -> Raw:
    """``raw`` with what ``[run] tensorboard`` said in earlier versions under its name of today."""
    run = dict(section_of(raw, "run"))
    if not isinstance(run.get("tensorboard"), bool):
        return raw
    wanted = ["tensorboard"] if run.pop("tensorboard") else []
    return {**raw, "run": {"tracking": wanted, **run}}


def flat(tree: Raw, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested mappings with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _check_dots(text: str) -> None:
    """Raise for a key of thousands of parts, on which the parser would take the square of their number."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > _MOST_DOTS and _QUOTED.sub("", line).count(".") > _MOST_DOTS:
            raise ValueError(f"line {number} has a key with thousands of dots")


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
