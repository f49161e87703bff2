"""Where datasets come from. A source is one module of this package, or of an installed one (:mod:`coterie.plugins`).

To add one, write a module with

- ``PREFIX``: a dataset of this source is named ``PREFIX:REST`` (or ``PREFIX`` alone, where ``REST`` may be empty),
- ``USAGE``: such a name and what it stands for, in one line, for the message about an unknown name,
- ``load(rest, root, columns) -> tuple[Dataset, ...]``: the datasets that the name stands for, mostly one.

A source only brings tables (:func:`coterie.data.files.table_of` makes one from records): columns, labels, missing
splits and partitions are handled the same way for all of them. ``root`` is the folder that relative paths start at.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from coterie import plugins
from coterie.data.files import RowTable
from coterie.data.settings import Columns
from coterie.plugins import check_new, installed
from coterie.types import CoterieError

GROUP = "coterie.sources"


@dataclass(frozen=True)
class Dataset:
    """A dataset as its source has it: a table per split ("train", and "validation" and "test" if there are any).

    ``labels`` are the label names in order and ``group`` is the rows' domain, if the source knows them; ``notes`` go
    into the manifest.
    """

    name: str
    tables: Mapping[str, RowTable]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    group: str | None = None


@cache
def sources() -> dict[str, ModuleType]:
    """Every source of this package by its prefix."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.PREFIX: module for module in modules if hasattr(module, "PREFIX")}


@cache
def source_named(prefix: str) -> ModuleType | None:
    """The source of a prefix, of this package or of an installed one; None where there is none.

    An installed package names its source's module in the entry point group ``coterie.sources``, under its prefix.
    """
    check_new(GROUP, sources())
    if prefix not in installed(GROUP):
        return sources().get(prefix)
    source = plugins.load(installed(GROUP)[prefix])
    if missing := [name for name in ("PREFIX", "USAGE", "load") if not hasattr(source, name)]:
        raise CoterieError(f"the source {prefix!r} lacks {', '.join(missing)}; it must be a module that has them")
    if prefix != source.PREFIX:
        raise CoterieError(f"the source {prefix!r} has PREFIX = {source.PREFIX!r}; its entry point must have that name")
    module: ModuleType = source
    return module


def usages() -> list[str]:
    """How the datasets of every source are named."""
    return [source.USAGE for prefix in [*sources(), *installed(GROUP)] if (source := source_named(prefix))]


def load(name: str, root: Path, columns: Columns) -> tuple[Dataset, ...]:
    """The datasets that ``name`` stands for: ``PREFIX:REST`` of a source, or else the path of a folder.

    Raises :class:`~coterie.types.CoterieError` where there are none.
    """
    prefix, _, rest = name.partition(":")
    source = source_named(prefix)
    datasets: tuple[Dataset, ...] = (
        source.load(rest, root, columns) if source else sources()["folder"].load(name, root, columns)
    )
    return datasets
