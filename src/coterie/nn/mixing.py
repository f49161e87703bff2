"""The mixing of experts' responses, for the gate ``mixing``: what one expert's A finds may reach another's B.

    y = W0 x + s B ( w * z + C z / 10 )      z = A x~ [N], w [N], C [N, N]

The gate ``signed`` only says how much each B_e A_e counts. C has N^2 numbers where a LoRA has r (d_in + d_out). No
token changes w and C, so B (diag(w) + C / 10) A is a single LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

SHARE = 0.1  # of C: its numbers then suit the steps that suit w


def mixing_of(table: Tensor, rank: int, first: int = 0) -> Tensor:
    """C / 10 [rank, rank] of a router ``table`` = [w, C] [N, 1 + N], with zeros outside the N from ``first`` on."""
    after = rank - first - len(table)
    return functional.pad(table[:, 1:] * SHARE, (first, after, first, after))


def matrix_of(table: Tensor) -> Tensor:
    """diag(w) + C / 10 [N, N], which is all that the router does."""
    return torch.diag(table[:, 0]) + mixing_of(table, len(table))


def check_ranks(ranks: Iterable[int]) -> None:
    """Raise :class:`ValueError` for experts of other ``ranks`` than 1: they cannot be mixed."""
    if {*ranks} != {1}:
        raise ValueError("it mixes experts of rank 1 alone")
