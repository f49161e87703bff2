"""Random streams: every draw is a function of the run's seed and of what it is for. There is no global seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor


def stream_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``(seed, *purpose)``: for example ``stream_seed(0, rnd, client_id, "batches")``."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *purpose: str | int) -> Generator:
    """A CPU generator at the start of the stream ``(seed, *purpose)``.

    torch's CPU generator keeps 32 bits of its seed: some two of n streams are equal with probability n^2 / 2^33.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *purpose))


def kaiming_uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform on +-1/sqrt(fan_in), float32: ``torch.nn.Linear``'s and LoRA's start (Kaiming uniform, a = sqrt 5)."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
