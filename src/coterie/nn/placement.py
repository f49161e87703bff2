"""Where a module computes: with a ``device_map``, its weights may wait on another device, or on the disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

DeviceMap = str | Mapping[str, int | str]  # "auto", "balanced" ..., or the device of each part of the model by name


def device_of(module: nn.Module) -> torch.device:
    """The device that ``module`` computes on: accelerate's, where it moves the weights there, else its weights' own."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    own = next(module.parameters()).device
    if device is None:
        return own
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def input_device(model: nn.Module) -> torch.device:
    """Where inputs of ``model`` may be: with its first weights, or on the CPU where those are loaded for every pass."""
    own = next(model.parameters()).device
    return torch.device("cpu") if own.type == "meta" else own
