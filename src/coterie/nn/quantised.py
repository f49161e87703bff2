"""A quantised base before it is loaded: how large it is, and where its parts may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import psutil
import torch
from torch import nn

from coterie.nn.placement import Placement
from coterie.nn.spec import head_modules
from coterie.types import CoterieError
from coterie.units import size

Quantize = Literal["none", "nf4", "int8"]
_OFF_DEVICE = ("cpu", "disk")
_SHARE = 0.9  # of the memory for a base; transformers leaves the rest for what quantising takes
_UNITS = {"K": 1, "M": 2, "G": 3}


def weight_bytes(model: nn.Module, quantize: Quantize) -> int:
    """The bytes of a model's weights and buffers, quantised as bitsandbytes does it: every Linear but the head, in 4
    bits with a float32 for 64 weights, or in 8 bits with one for each row."""
    tensors = [*model.parameters(), *model.buffers()]
    whole = sum(tensor.nbytes for tensor in tensors)
    if quantize == "none":
        return whole
    heads = {*head_modules(model), "lm_head", "embed_out"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[0] not in heads:
            number, weight = module.weight.numel(), module.weight
            whole += (number * 9 // 16 if quantize == "nf4" else number + 4 * len(weight)) - weight.nbytes
    return whole


def check_parts(placement: Placement, model: nn.Module, quantize: Quantize) -> None:
    """Raises :class:`CoterieError` if parts of a quantised ``model`` would be on the disk, or on the CPU beside others.

    bitsandbytes computes where the weights are. The weights of ``model`` are not read, only their sizes.
    """
    if quantize == "none":
        return
    device_map, limits = placement.resolved()
    if not isinstance(device_map, str):
        off = {part: device for part, device in device_map.items() if device in _OFF_DEVICE}
        if off and {*device_map.values()} != {"cpu"}:
            part, device = next(iter(off.items()))
            raise CoterieError(
                f"[model] quantize = {quantize!r} does not work with parts on the CPU or the disk, and device_map has "
                f"{part or 'all of it'!r} on {device!r}; name GPUs for all parts, or leave quantize out"
            )
        return
    needed, room = weight_bytes(model, quantize), _SHARE * sum(_room(each, limits) for each in placement.devices())
    if needed > room:
        raise CoterieError(offloaded(quantize, f"takes {size(needed)}, and {size(room)} are free for it"))


def offloaded(quantize: Quantize, why: str = "does not fit its devices") -> str:
    """That an automatic placement would leave parts of a quantised base on the CPU or the disk."""
    smaller = ', set quantize = "nf4"' if quantize == "int8" else ""
    return (
        f"[model] quantize = {quantize!r} does not work with parts on the CPU or the disk: the base {why}, so that "
        f"device_map would put some there; raise max_memory or add a GPU{smaller}, or leave quantize out"
    )


def _room(device: torch.device, limits: Mapping[int | str, int | str] | None) -> int:
    """The bytes of ``device`` for weights: those of ``max_memory``, or what is free."""
    if limits is not None:
        return _bytes(limits.get("cpu" if device.type == "cpu" else device.index, 0))
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else int(psutil.virtual_memory().available)


def _bytes(limit: int | str) -> int:
    """A limit of ``max_memory`` in bytes: a number, or text as ``20GiB`` or ``800MB``."""
    if isinstance(limit, int):
        return limit
    unit = limit.lstrip("0123456789. ")
    return int(float(limit.removesuffix(unit)) * (1024 if "i" in unit else 1000) ** _UNITS[unit[0]])
