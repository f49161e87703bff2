"""Whether a decoder keeps packed rows apart, by a trial."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.nn.base import Base
from coterie.nn.first_token import same_logits
from coterie.types import CoterieError


def check_packs(base: Base) -> None:
    """Raises :class:`CoterieError` for a decoder that gives other logits to rows that are packed into one."""
    ids = torch.arange(9, device=base.device).view(1, -1) % base.vocabulary
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3, 4]], device=base.device)
    first, second = ids[:, :5], ids[:, 5:]
    rows = torch.cat([torch.cat([first, second], 1), torch.cat([second, first], 1)])
    if base.packs_flat:
        rows, positions = rows.view(1, -1), positions.view(1, -1)
    with torch.no_grad():
        alone: list[Tensor] = [base.model(input_ids=row, use_cache=False).logits for row in (first, second)]
        whole = torch.cat([*alone, *alone[::-1]], 1).view(*rows.shape, -1)
        try:
            made: Tensor = base.model(input_ids=rows, position_ids=positions, use_cache=False).logits
        except (TypeError, RuntimeError, ValueError):
            made = whole + torch.inf
    if not same_logits(whole, made):
        raise CoterieError(
            f"{base.path}: rows of this model cannot be packed: packed rows see each other, or positions do not start "
            "anew; leave out [train] packing"
        )
