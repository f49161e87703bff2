"""What the clients of a secure sum were sent, as digests: all must have been sent the same.

If the server sends zeros to all but one, their updates are zero, and the sum is the last one's update (Pasquini et al.
2022, https://arxiv.org/abs/2111.07380). So a session names what its members start from, and each compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.types import Instruction, Key, Part, Tensors


@dataclass(frozen=True)
class Begun:
    """Digests of what a client was sent in a round.

    ``start``: of the values that it starts from, by tensor. ``instruction``: of what all clients get alike, tensors
    but heads and ``info``; "" for a method that sends each client its own. ``whole``: of everything.
    """

    start: Mapping[Key, str]
    instruction: str
    whole: str

    def of(self, key: Key) -> str:
        """The digest of where ``key`` starts; "" where the client makes the start by itself."""
        return self.start.get(key, "")


def begun(ins: Instruction, start: Tensors, alike: bool) -> Begun:
    """What a client begins from, which got ``ins`` and started from ``start``.

    Heads are bound by their values in ``start`` alone: clients with other labels get others.
    """
    values = {key: _digest(start[key]) for key in ins.tensors.keys() & start.keys()}
    sent = {str(key): _digest(value) for key, value in ins.tensors.items()}
    common = {str(key): sent[str(key)] for key in ins.tensors if key.part is not Part.HEAD}
    return Begun(values, _all_of(common, ins) if alike else "", _all_of(sent, ins))


def _all_of(tensors: Mapping[str, str], ins: Instruction) -> str:
    return hashlib.sha256(json.dumps([tensors, dict(ins.info)], sort_keys=True).encode()).hexdigest()


def _digest(value: Tensor) -> str:
    value = value.detach().cpu().contiguous()
    about = f"{value.dtype} {list(value.shape)} ".encode()
    return hashlib.sha256(about + value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
