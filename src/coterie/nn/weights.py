"""Recognises a base by the weights in its files: those in memory may have another dtype, or be quantised."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from coterie.nn.locate import weight_files
from coterie.types import BaseSpec, CoterieError

_ROWS = 8  # rows read of every weight: training, or merging a LoRA, changes all rows, so the first few are enough
_WEIGHT = ".weight"


def digests(path: str, modules: Iterable[str]) -> dict[str, str]:
    """By module: 16 digits of a SHA-256 over its weight's shape and first rows, in the base's safetensors files.

    A module's name may have a prefix that the files do not have, or lack one that they have, as in a model with a head.
    A module whose weight is missing or occurs twice is left out. So are all modules if the files have another format or
    are not on this machine.
    Raises :class:`CoterieError` for a damaged file.
    """
    by_module: dict[str, str] = {}
    where: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for file in weight_files(path):
        for stored in _stored(file):
            for ending in endings(stored):
                where[ending].append((file, stored))
    for module in modules:
        shorter = (entry for ending in endings(module)[1:] for entry in where[ending] if entry[1] == ending)
        matches = {*where[module], *shorter}
        if len(matches) == 1:
            by_module[module] = _digest(*matches.pop())
    return by_module


def fingerprint(by_module: Mapping[str, str], modules: Iterable[str]) -> str:
    """SHA-256 over the digests (:func:`digests`) of these ``modules``, "" where one of them is not known."""
    named = sorted({*modules})
    if not named or not all(by_module.get(module) for module in named):
        return ""
    return hashlib.sha256("".join(f"{module} {by_module[module]}\n" for module in named).encode()).hexdigest()


def identified(spec: BaseSpec, path: str) -> BaseSpec:
    """``spec`` with a digest of each target's weights."""
    by_module = digests(path, [target.name for target in spec.targets])
    return replace(spec, targets=tuple(replace(t, weights=by_module.get(t.name, "")) for t in spec.targets))


def endings(module: str) -> list[str]:
    """``a.b.c``, ``b.c``, ``c``."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _stored(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return [name.removesuffix(_WEIGHT) for name in opened.keys() if name.endswith(_WEIGHT)]  # noqa: SIM118
    except SafetensorError as fault:
        raise CoterieError(f"{file} is damaged ({fault}); download the base again") from fault


def _digest(file: Path, stored: str) -> str:
    with safe_open(file, "pt") as opened:
        part = opened.get_slice(stored + _WEIGHT)
        shape, rows = part.get_shape(), part[:_ROWS].to(torch.float32).contiguous()
    return hashlib.sha256(str(list(shape)).encode() + rows.numpy().tobytes()).hexdigest()[:16]
