"""Where a module computes: with a ``device_map``, its weights may be on another device, or on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coterie.machine import devices
from coterie.types import CoterieError

DeviceMap = str | Mapping[str, int | str]  # "auto", "balanced" ..., or the device of each part of the model by name
_OFFLOADED = ("cpu", "disk")
_OF_ACCELERATE = ("_hf_hook", "_old_forward", "forward")  # what its hooks add to a module


@dataclass(frozen=True)
class Placement:
    """The ``device_map`` of a base, and the memory of each device that ``"auto"`` and the like may fill with weights,
    in bytes or as text (``"20GiB"``). Empty: what is free."""

    device_map: DeviceMap
    max_memory: Mapping[str, int | str] = field(default_factory=dict)

    def resolved(self) -> tuple[DeviceMap, dict[int | str, int | str] | None]:
        """Both as accelerate takes them: a CUDA device is a number.

        Raises :class:`CoterieError` for a device that this machine does not have.
        """
        limits = {_device(name, "max_memory"): limit for name, limit in self.max_memory.items()}
        if isinstance(self.device_map, str):
            return self.device_map, limits or None
        return {part: _device(name, "device_map") for part, name in self.device_map.items()}, limits or None

    def check(self, model: nn.Module) -> None:
        """Raises :class:`CoterieError` for a map by name that does not fit ``model``, whose weights are not read: it
        has to name every part, no others, and one device for parts that share weights."""
        device_map, _ = self.resolved()
        if isinstance(device_map, str):
            return
        parameters = dict(model.named_parameters(remove_duplicate=False))
        known = {name for name, _ in model.named_modules()} | parameters.keys()
        if unknown := sorted(device_map.keys() - known):
            raise CoterieError(f"[model] device_map names {unknown[0]!r}, which this base does not have; remove it")
        placed = {name: _placed(name, device_map) for name in parameters}
        if lost := [name for name, device in placed.items() if device is None]:
            raise CoterieError(f"[model] device_map names no device for {lost[0]!r}; add it, or the part that it is in")
        first: dict[int, str] = {}
        for name, parameter in parameters.items():
            other = first.setdefault(id(parameter), name)
            if placed[other] != placed[name]:
                raise CoterieError(
                    f"[model] device_map puts {other!r} on {placed[other]!r} and {name!r} on {placed[name]!r}, but "
                    "they are the same weights; name one device for both"
                )

    def devices(self) -> tuple[torch.device, ...]:
        """The devices that compute: the GPUs of the map, or the CPU where it has none."""
        device_map, limits = self.resolved()
        named = limits if isinstance(device_map, str) else dict.fromkeys(device_map.values())
        names = devices() if named is None else [f"cuda:{each}" for each in named if isinstance(each, int)]
        gpus = [torch.device(name) for name in sorted(names) if name != "cpu"]
        return (*gpus,) or (torch.device("cpu"),)


def _device(name: int | str, where: str) -> int | str:
    number = str(name).removeprefix("cuda:")
    known: int | str = int(number) if number.isdecimal() else str(name)
    here = devices()
    if known not in _OFFLOADED and (f"cuda:{known}" if isinstance(known, int) else known) not in here:
        raise CoterieError(f"[model] {where} names {name!r}; this machine has {', '.join(here)} (and disk)")
    return known


def device_of(module: nn.Module) -> torch.device:
    """The device that ``module`` computes on: accelerate's, where it moves the weights there, else its weights' own."""
    hook = getattr(module, "_hf_hook", None)
    found = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    device = next((each for each in found if each is not None), None)
    if device is None:
        return next(module.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def computing_devices(model: nn.Module) -> tuple[torch.device, ...]:
    """All devices that ``model`` computes on: one, unless transformers has put its parts on several."""
    if len(getattr(model, "hf_device_map", {})) < 2:
        return (input_device(model),)
    own = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    found = {device_of(module) for module in own}
    return tuple(sorted((device for device in found if device.type != "meta"), key=str))


def input_device(model: nn.Module) -> torch.device:
    """Where inputs of ``model`` belong: the device that its first weights, the embeddings, compute on."""
    first = next(module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    device = device_of(first)
    return torch.device("cpu") if device.type == "meta" else device


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are loaded for every pass, because they are on no device of their own."""
    return any(parameter.is_meta for parameter in model.parameters())


def on_disk(model: nn.Module, name: str) -> bool:
    """Whether transformers' map of ``model`` has the parameter ``name``, or what it is in, on the disk."""
    return _placed(name, getattr(model, "hf_device_map", {})) == "disk"


def _placed(name: str, device_map: Mapping[str, int | str]) -> int | str | None:
    """The device of the parameter ``name``: that of the smallest part of the map that it is in."""
    parts = name.split(".")
    above = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next((device_map[part] for part in above if part in device_map), None)


def without_hooks(module: nn.Module) -> None:
    """Take accelerate's hooks off ``module``, a copy whose weights are on the device that they compute on."""
    for each in module.modules():
        for name in _OF_ACCELERATE:
            each.__dict__.pop(name, None)


def hooks_of(module: nn.Module) -> Iterator[object]:
    """accelerate's hooks on ``module`` and in it, which may hold all offloaded weights."""
    return (each.__dict__["_hf_hook"] for each in module.modules() if "_hf_hook" in each.__dict__)


def on_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """``tensors`` on one device, to be added up: they come from modules on several."""
    return [tensor.to(device) for tensor in tensors]
