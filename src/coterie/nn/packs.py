"""Whether a decoder keeps packed rows apart, by a trial."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.nn.base import Base
from coterie.nn.first_token import same_logits
from coterie.types import CoterieError


def check_packs(base: Base) -> None:
    """Raises :class:`CoterieError` for a decoder that gives other logits to rows that are packed into one.

    A run in bfloat16 calls it under its autocast.
    """
    ids = torch.arange(9, device=base.device).view(1, -1) % base.vocabulary
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, 4]], device=base.device)
    first, second = ids[:, :5], ids[:, 5:]
    rows = torch.cat([torch.cat([first, second], 1), torch.cat([second, first], 1)])
    if base.packs_flat:
        rows, positions = rows.view(1, -1), positions.view(1, -1)
    with torch.no_grad():
        try:
            alone = [_logits(base, input_ids=row) for row in (first, second)]
            whole = torch.cat([*alone, *alone[::-1]], 1).view(*rows.shape, -1)
            same = same_logits(whole, _logits(base, input_ids=rows, position_ids=positions))
        except (TypeError, RuntimeError, ValueError):
            same = False
    if not same:
        raise CoterieError(
            f"{base.path}: rows of this model cannot be packed: packed rows see each other, or positions do not start "
            "anew; leave out [train] packing"
        )


def _logits(base: Base, **inputs: Tensor) -> Tensor:
    """The logits, in autocast's dtype where it is on: a model may return more digits than were computed."""
    logits: Tensor = base.model(**inputs, use_cache=False).logits
    kind = base.device.type
    return logits.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else logits
