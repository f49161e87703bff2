"""Short names for modules, and which of many a picture shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Each module's numbers and the end of its path, kept short but unique: ``3.query``, ``3.output.dense``."""
    paths = {module: module.split(".") for module in modules}
    kept = dict.fromkeys(paths, 1)
    while True:
        names = {m: ".".join([*(p for p in path[: -kept[m]] if p.isdecimal()), *path[-kept[m] :]])
                 for m, path in paths.items()}  # fmt: skip
        owners: dict[str, list[str]] = {}
        for module, name in names.items():
            owners.setdefault(name, []).append(module)
        unclear = [m for same in owners.values() if len(same) > 1 for m in same if kept[m] < len(paths[m])]
        if not unclear:
            return names
        kept |= {m: kept[m] + 1 for m in unclear}


def layers_and_matrices(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The layer and the matrix of every module: ``("3", "query")`` for ``encoder.layer.3.attention.self.query``.

    A matrix is named in full where two of a layer end in the same name (BERT's ``output.dense`` and
    ``attention.output.dense``). A module without a number has the layer ``-``.
    """
    parts = {m: (match[1], match[2]) if (match := _LAYER.fullmatch(m)) else ("-", m) for m in modules}
    short = {rest: rest.rsplit(".", 1)[-1] for _, rest in parts.values()}
    several = {leaf for leaf in short.values() if list(short.values()).count(leaf) > 1}
    return {m: (layer, rest if short[rest] in several else short[rest]) for m, (layer, rest) in parts.items()}


def shown_modules(modules: Sequence[str]) -> list[str]:
    """The first, the middle and the last of ``modules``: what a picture has room for."""
    return [modules[i] for i in sorted({0, len(modules) // 2, len(modules) - 1})] if modules else []


def how_many(shown: int, modules: Sequence[str]) -> str:
    """``3 of 12 modules. `` where not all are shown, else nothing."""
    return f"{shown} of {len(modules)} modules. " if shown < len(modules) else ""
