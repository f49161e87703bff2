"""The gradients of each row where many clients share a pass: what :mod:`coterie.nn.per_row` does, client by client.

The two products of :mod:`coterie.nn.many` give no gradients to parameters then. Each client's part of what the backward
pass brings goes to the client's own :class:`~coterie.nn.per_row.PerRow`, which leaves out the rows of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coterie.nn.many_products import Picked
from coterie.nn.per_row import PerRow, check_rows, watched
from coterie.types import Key

NOTHING = Picked((), (), None, (0, 0))
Piece = tuple[int, int, int, Key]  # of a product's columns: the client's position in the pass, from, to, whose they are


@dataclass(frozen=True)
class ByRow:
    """What collects the rows' gradients of the clients of a pass, by position: None for one without a bank of
    ``module``."""

    each: tuple[PerRow | None, ...]
    module: str

    def check(self, x: Tensor, rows: int) -> None:
        """Raise :class:`CoterieError` where ``x`` is not of so many ``rows``, those of all clients, one by one."""
        check_rows(x, rows, self.module)

    def projected(self, parts: Sequence[Tensor], x: Tensor, pieces: Sequence[Piece]) -> None:
        """Collect the gradients of A and of routers, whose products with x [c, n, i] are ``parts`` [c, n, size]."""
        x, version, low = x.detach(), x._version, 0
        for values in parts:
            high = low + values.shape[2]
            mine = [(at, lo - low, hi - low, key) for at, lo, hi, key in pieces if low <= lo < high]
            low = high

            def add(grad: Tensor, mine: Sequence[Piece] = mine) -> None:
                assert x._version == version, f"the input of {self.module} was overwritten"
                for at, lo, hi, key in mine:
                    self._of(at).add(key, grad[at, :, lo:hi], x[at])

            if mine:
                watched(values, add)

    def added(self, result: Tensor, columns: Callable[[], Tensor], pieces: Sequence[Piece]) -> Tensor:
        """``result`` [c*b, ..., o], for which B meets ``columns()`` [c, n, R]; collects the gradients of B."""
        if not pieces:
            return result

        def add(grad: Tensor) -> None:
            u = columns().detach()
            flat = grad.reshape(*u.shape[:2], -1)
            for at, lo, hi, key in pieces:
                self._of(at).add(key, flat[at], u[at, :, lo:hi])

        return watched(result, add)

    def _of(self, at: int) -> PerRow:
        rows = self.each[at]
        assert rows is not None, f"{self.module} trains a client whose rows are not collected"
        return rows
