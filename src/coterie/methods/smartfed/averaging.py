"""What averaging costs SmartFed where LoRAs train: the fresh expert, and adapters of the pool."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.methods.parts import lora_of, mean_error
from coterie.ops.mean import relative_error
from coterie.types import SHARED, Part, Tensors


def error_of(uploads: Sequence[Tensors], weights: Sequence[float], scaling: float) -> float | None:
    """What averaging A and B of all experts in ``uploads`` separately loses; None if only routers travel.

    ``scaling`` is that of the fresh expert; an adapter has its own in B.
    """
    loras = [lora_of(upload) for upload in uploads]
    alike = [
        {key: value * scaling if (key.expert, key.part) == (SHARED, Part.B) else value for key, value in lora.items()}
        for lora in loras
    ]
    return relative_error(mean_error(alike, weights)) if loras[0] else None
