"""Where the parts of a base go: the settings ``device_map`` and ``max_memory``, and what does not go with them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from coterie.types import CoterieError

Automatic = Literal["auto", "balanced", "balanced_low_0", "sequential"]
_SIZE = re.compile(r"\d+(\.\d+)?\s?[KMG]i?B")
MAP = (
    "puts parts of the base on several devices, where each bank goes too: auto, balanced and the like by free memory; "
    "or a device, cpu or disk for each part by name; none: the whole base on [engine] device"
)
MEMORY = (
    'by device, the memory that an automatic device_map fills with weights, as in {"cuda:0" = "20GiB", cpu = "60GiB"}'
)


def _named(value: Automatic | dict[str, int | str] | None) -> Automatic | dict[str, int | str] | None:
    if value == {}:
        raise ValueError('name a device for each part, as in {"" = "cuda:0"}, or write "auto"')
    return value


def _sizes(value: dict[str, str]) -> dict[str, str]:
    if wrong := [size for size in value.values() if not _SIZE.fullmatch(size)]:
        raise ValueError(f'give each size as in "20GiB" or "800MB", not {wrong[0]!r}')
    return value


PlacedParts = Annotated[Automatic | dict[str, int | str] | None, AfterValidator(_named)]
MemoryLimits = Annotated[dict[str, str], AfterValidator(_sizes)]


def check_limits(device_map: object, max_memory: object) -> None:
    """Raises :class:`ValueError` for a limit that no automatic placement would read."""
    if max_memory and not isinstance(device_map, str):
        raise ValueError('max_memory counts only with an automatic device_map; set device_map = "auto"')


def check_engine(device_map: object, device: object, clients_per_batch: int | str, compiles: bool) -> None:
    """Raises :class:`CoterieError` for settings of ``[engine]`` that do not work with a base on several devices."""
    if device_map is None:
        return
    if device != "auto":
        raise CoterieError(
            f"[engine] device = {device!r} does not work with [model] device_map, which places the base; leave one out"
        )
    if compiles:
        raise CoterieError(
            "[engine] compile does not work with [model] device_map: hooks that move numbers between devices cannot be "
            "compiled; leave one out"
        )
    if clients_per_batch == "auto":
        raise CoterieError(
            '[engine] clients_per_batch = "auto" does not work with [model] device_map: it measures the memory of one '
            "device; give a number"
        )
