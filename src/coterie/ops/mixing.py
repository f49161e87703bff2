"""The mixing of rank-1 experts, for the gate ``mixing``: what one expert's A finds may reach another's B.

    y = W0 x + s B ( w * z + C z / 10 )      z = A x~ [N], w [N], C [N, N]

The gate ``signed`` only says how much each B_e A_e counts. C has N^2 numbers where a LoRA has r (d_in + d_out). No
token changes w and C, so B (diag(w) + C / 10) A is a single LoRA. A router is a table [w, C] [N, 1 + N].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_SHARE = 0.1  # C is stored times 10, so that one learning rate suits w and C


def mixing_of(table: Tensor, rank: int, first: int = 0) -> Tensor:
    """C / 10 [rank, rank] of a router, with zeros outside the N experts from ``first`` on."""
    after = rank - first - len(table)
    return functional.pad(table[:, 1:] * _SHARE, (first, after, first, after))


def matrix_of(table: Tensor) -> Tensor:
    """diag(w) + C / 10 [N, N], which is all that a router does."""
    return torch.diag(table[:, 0]) + mixing_of(table, len(table))


def sizes_of(table: Tensor) -> Tensor:
    """How much each expert counts [N]: the mean of what reaches its B and of what its A gives. |w| where C = 0."""
    sizes = matrix_of(table).abs()
    return (sizes.sum(0) + sizes.sum(1)) / 2


def of_some(table: Tensor, rows: Sequence[int]) -> Tensor:
    """The router of the experts in these ``rows`` alone: their rows, and of C their columns."""
    return table[list(rows)][:, [0, *(1 + row for row in rows)]]


def check_ranks(ranks: Iterable[int]) -> None:
    """Raise :class:`ValueError` for experts of other ``ranks`` than 1: they cannot be mixed."""
    if not {*ranks} <= {1}:
        raise ValueError("it can only mix experts of rank 1")
