"""The gradient of each row of a batch, cut to a length, without holding one gradient for each row.

A trained matrix W whose rows' losses add up has the gradient sum_b sum_t l_bt r_bt^T, with l [b, t, k] and r [b, t, d]
from the backward pass. The squared norm of row b's part is <l_b l_b^T, r_b r_b^T>, from two Grams of t x t numbers
(ghost clipping; Li et al., arXiv 2110.05679), or of the part itself where that is smaller, as it is for few ranks and
many tokens. The sum of all rows' parts, each times its factor, is one more product of l and r, and needs no second
backward pass (Bu et al., arXiv 2210.00038). A matrix that several passes or modules use has its l and r one after
another: its part is the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coterie.nn.placement import on_device
from coterie.types import CoterieError, Key

_ROUNDINGS = 16  # of a product of l and r in their dtype, which the cut allows for


@dataclass
class PerRow:
    """Collects l and r of every trained tensor in one backward pass of a batch of so many ``rows``.

    After them the pass may hold so many rows of ``padding``, of which nothing is collected.
    """

    rows: int
    padding: int = 0
    parts: dict[Key, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, key: Key, left: Tensor, right: Tensor) -> None:
        """Note that the gradient of ``key`` has the part left^T right. Shapes: left [n, k], right [n, d]."""
        wide = torch.promote_types(left.dtype, torch.float32)
        self.parts.setdefault(key, []).append((self._own(left).to(wide), self._own(right).to(wide)))

    def _own(self, values: Tensor) -> Tensor:
        """``values`` [n, k] as [rows, t, k], without the rows of padding."""
        return values.detach().reshape(self.held, -1, values.shape[-1])[: self.rows]

    @property
    def held(self) -> int:
        """The rows that the pass holds."""
        return self.rows + self.padding

    def check(self, x: Tensor, module: str) -> None:
        """Raise :class:`CoterieError` where it cannot be known which row a part of ``x`` belongs to."""
        check_rows(x, self.held, module)

    def clipped(self, clip: float) -> dict[Key, Tensor]:
        """The sum over rows of their gradients, each over all tensors together cut to the length ``clip``."""
        parts = {key: (_joined(of, 0), _joined(of, 1)) for key, of in self.parts.items()}
        first = next(left.device for left, _ in parts.values())
        squares = on_device((squared_norms(left, right) for left, right in parts.values()), first)
        norms = torch.stack(squares).sum(0).sqrt()
        norms = norms + sum(on_device((_rounding(left, right) for left, right in parts.values()), first))
        factors = (clip / norms.clamp_min(1e-300)).clamp_max(1.0)
        whole = torch.isfinite(norms)  # a row whose gradient is not a number has none
        return {
            key: _sum(left, right, factors.to(left.device), whole.to(left.device))
            for key, (left, right) in parts.items()
        }


def check_rows(x: Tensor, rows: int, module: str) -> None:
    """Raise :class:`CoterieError` where ``x``, what ``module`` takes, is not of so many ``rows`` one by one."""
    if x.ndim != 3 or x.shape[0] != rows:
        raise CoterieError(
            f'{module} takes {list(x.shape)} where the batch has {rows} rows: [privacy] unit = "example" '
            "needs the rows apart; choose other [lora] targets"
        )


def squared_norms(left: Tensor, right: Tensor) -> Tensor:
    """||left_b^T right_b||^2 of each row. Shapes: left [b, t, k], right [b, t, d], result [b], in float64.

    Where tokens take each other off, Grams in float32 would lose all of it, and the row would not be cut: they are in
    float64, and what even that may lose is added.
    """
    _, tokens, k = left.shape
    d = right.shape[-1]
    if tokens * (k + d) <= k * d:
        wide = left.double(), right.double()
        lost = _ROUNDINGS * torch.finfo(torch.float64).eps * _sizes(left, right).square()
        return ((wide[0] @ wide[0].mT) * (wide[1] @ wide[1].mT)).sum((1, 2)).clamp_min(0) + lost
    return (left.mT @ right).double().square().sum((1, 2))


def _rounding(left: Tensor, right: Tensor) -> Tensor:
    """By how much rounding may make each row's part longer than it is: [b]."""
    return _ROUNDINGS * torch.finfo(left.dtype).eps * _sizes(left, right)


def _sizes(left: Tensor, right: Tensor) -> Tensor:
    """sum_t ||l_bt|| ||r_bt||, the length of each row's part if no token took off another's: [b], in float64."""
    squares = [of.double().square().sum(-1) for of in (left, right)]
    return (squares[0] * squares[1]).sqrt().sum(1)


def watched(values: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """``values``, whose gradient goes to ``add`` in the backward pass, also where nothing before them is trained."""
    if torch.is_grad_enabled():
        (values if values.requires_grad else values.requires_grad_()).register_hook(add)
    return values


Now = Callable[[], PerRow | None]


def watch_head(head: nn.Module, keys: Mapping[int, Key], now: Now) -> None:
    """Collect the parts of a head's trained parameters, whose keys are by ``id``, in what ``now`` returns in a pass.

    The hooks stay as long as the head. Raises :class:`CoterieError` for a trained parameter that is not of a Linear.
    """
    known: set[Key] = set()
    for module in head.modules():
        own = module.named_parameters(recurse=False) if isinstance(module, nn.Linear) else ()
        if mine := {name: keys[id(p)] for name, p in own if id(p) in keys}:
            known |= {*mine.values()}
            module.register_forward_hook(_Watching(mine, now))
    trained = {keys[id(p)] for p in head.parameters() if id(p) in keys}
    if other := sorted(trained - known):
        raise CoterieError(
            f'[privacy] unit = "example" trains heads of Linears alone, and {other[0].module} is of none'
        )


@dataclass(frozen=True)
class _Watching:
    """A forward hook of a Linear: ``keys`` of its trained parameters by their names."""

    keys: Mapping[str, Key]
    now: Now

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows, x = self.now(), args[0]
        if rows is None or not output.requires_grad:
            return
        if x.shape[0] != rows.held:
            raise CoterieError(
                f'the head takes {list(x.shape)} where the batch has {rows.held} rows: [privacy] unit = "example" '
                "needs the rows apart; choose another [model] path"
            )

        def add(grad: Tensor) -> None:
            flat = grad.reshape(-1, grad.shape[-1])
            if "weight" in self.keys:
                rows.add(self.keys["weight"], flat, x.reshape(-1, x.shape[-1]))
            if "bias" in self.keys:
                rows.add(self.keys["bias"], flat, flat.new_ones(len(flat), 1))

        output.register_hook(add)


def _joined(parts: list[tuple[Tensor, Tensor]], side: int) -> Tensor:
    return parts[0][side] if len(parts) == 1 else torch.cat([pair[side] for pair in parts], dim=1)


def _sum(left: Tensor, right: Tensor, factors: Tensor, whole: Tensor) -> Tensor:
    """The sum over rows of left_b^T right_b times their factors: [k, d]. Rows that are not ``whole`` count as 0."""
    if not bool(whole.all()):
        rows = whole[:, None, None]
        left, right = torch.where(rows, left, 0.0), torch.where(rows, right, 0.0)
        factors = torch.where(whole, factors, 0.0)
    weighed = (left.double() * factors[:, None, None]).to(left.dtype)  # a tiny factor has few digits in float32
    return weighed.flatten(0, 1).T @ right.flatten(0, 1)
