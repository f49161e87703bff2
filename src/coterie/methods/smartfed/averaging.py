"""What SmartFed averages: what that costs where LoRAs train, and what a rule of ``[robust]`` sees together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from coterie.methods.parts import lora_of, mean_error
from coterie.methods.robust import Group
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


def routers_apart(groups: Iterable[Group]) -> list[Group]:
    """``groups`` with the routers in groups of their own.

    A step moves weights of experts a hundred times as far as a LoRA. In one vector with a fresh expert, an adapter that
    trains or a shared head, they would be all that a rule sees.
    """
    made = []
    for group in groups:
        routers = frozenset(key for key in group.keys if key.part is Part.ROUTER)
        made += [replace(group, keys=keys) for keys in (group.keys - routers, routers) if keys]
    return made
