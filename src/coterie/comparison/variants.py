"""What is compared: methods, variants of a method with other settings, and the config of each run.

A variant is a method with its own settings: ``fedamole:assignment=static``, more settings after more colons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from coterie.config.load import Raw, check_config, method_name, override, section_of
from coterie.config.sections import Config
from coterie.methods.registry import method_named, methods

ALL = "all"

Point = tuple[str, ...]  # settings that tuning chose, each as KEY=VALUE
T = TypeVar("T")


def variants_of(names: Iterable[str]) -> tuple[str, ...]:
    """The variants that ``names`` stand for, each once: ``all`` is every registered method."""
    stripped = [name.strip() for name in names]
    return tuple(dict.fromkeys(v for name in stripped for v in (methods() if name == ALL else [name])))


def config_for(raw: Raw, variant: str, seed: int, point: Point = ()) -> Config:
    """The config of one run of a comparison: the file's, with this variant, this seed and these settings.

    ``[methods.NAME]`` holds a method's own settings, and ``[method]`` those of the one that it names.
    """
    method, *settings = variant.split(":")
    method_named(method)
    prefix = f"methods.{method}."
    raw = override(raw, [setting for setting in point if not setting.startswith("methods.")])
    settings += [setting.removeprefix(prefix) for setting in point if setting.startswith(prefix)]
    own = section_of(raw, "method") if method_name(raw) == method else {}
    own = section_of(override({"method": own}, [f"method.{setting}" for setting in settings]), "method")
    return check_config({**raw, "method": {**own, "name": method}, "run": {**section_of(raw, "run"), "seed": seed}})


def folder_of(variant: str, seed: int, point: Point = ()) -> str:
    """The name of a run's folder: ``fedamole-assignment-static-0``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([variant, *point, str(seed)]))


def title_of(variant: str) -> str:
    """The title in tables and pictures: ``FedAMoLE, assignment static``."""
    method, *settings = variant.split(":")
    return ", ".join([method_named(method).title, *(setting.replace("=", " ") for setting in settings)])


def contenders(variants: Mapping[str, T]) -> dict[str, T]:
    """The variants that can be the best: not those that train on all clients' rows, unless there are no others."""
    references = {name for name, kind in methods().items() if kind.needs_all_rows}
    federated = {v: of for v, of in variants.items() if v.partition(":")[0] not in references}
    return federated or dict(variants)
