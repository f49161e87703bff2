"""The two batched products of :mod:`coterie.nn.many`, with gradients for what each client trains and nothing else.

What :class:`coterie.nn.products.Project` and ``Add`` are for one client, these are for many: c clients, n rows each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coterie.nn.products import Kept, dropped

Piece = tuple[int, int, int]  # of a stack: the client's place, from row, to row


@dataclass(frozen=True)
class Picked:
    """Which of a product's columns [c, n, k] each client trains. ``index`` [c, m] picks them; None: ``span`` does."""

    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[Piece, ...]
    index: Tensor | None
    span: tuple[int, int]

    @staticmethod
    def of(chosen: Sequence[tuple[int, int, int, nn.Parameter]], clients: int, device: torch.device) -> Picked:
        """From (client, from, to, parameter). One span for all if it covers at most twice the rows needed."""
        parameters = tuple(parameter for *_, parameter in chosen)
        if not chosen:
            return Picked((), (), None, (0, 0))
        by_client: list[list[tuple[int, int]]] = [[] for _ in range(clients)]
        for at, lo, hi, _ in chosen:
            by_client[at].append((lo, hi))
        most = max(sum(hi - lo for lo, hi in spans) for spans in by_client)
        first, last = min(lo for _, lo, _, _ in chosen), max(hi for _, _, hi, _ in chosen)
        if last - first <= 2 * most:
            pieces = tuple((at, lo - first, hi - first) for at, lo, hi, _ in chosen)
            return Picked(parameters, pieces, None, (first, last))
        index, places, filled = torch.zeros(clients, most, dtype=torch.long), [], [0] * clients
        for at, lo, hi, _ in chosen:
            start, stop = filled[at], filled[at] + hi - lo
            index[at, start:stop] = torch.arange(lo, hi)
            places.append((at, start, stop))
            filled[at] = stop
        return Picked(parameters, tuple(places), index.to(device), (0, most))

    def grads(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """left[c, :, rows]^T right[c] for the rows of every parameter, in order. left [c, n, k], right [c, n, i]."""
        if not self.pieces:
            return
        if self.index is None:
            part = left[..., self.span[0] : self.span[1]]
        else:
            part = left.gather(2, self.index.unsqueeze(1).expand(-1, left.shape[1], -1))
        whole = part.mT @ right
        for (at, lo, hi), parameter in zip(self.pieces, self.parameters, strict=True):
            yield whole[at, lo:hi].to(parameter.dtype)


class _Projected(Kept):
    """What :class:`ProjectMany` keeps for its backward."""

    scale: float
    trained: Picked


class ProjectMany(torch.autograd.Function):
    """x~ W^T for every client in parts of ``sizes``, x~ = x with dropout; gradients for x and the trained rows of W.

    Shapes: x [c, n, i], W [c, >= k, i], keep [c, n, i] or None, results [c, n, size], k = the sum of the sizes. Keeps x
    and keep (a byte each), not x~.
    """

    @staticmethod
    def forward(
        ctx: _Projected,
        x: Tensor,
        weight: Tensor,
        keep: Tensor | None,
        scale: float,
        sizes: tuple[int, ...],
        trained: Picked,
        *_: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x if trained.pieces else None, weight, keep)
        ctx.scale, ctx.trained = scale, trained
        both = x @ weight.mT if keep is None else (dropped(x, keep) @ weight.mT).mul_(scale)
        if sizes == (both.shape[2],):
            return (both,)
        return tuple(part.contiguous() for part in both[..., : sum(sizes)].split(sizes, dim=2))

    @staticmethod
    @once_differentiable
    def backward(ctx: _Projected, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep = ctx.saved_tensors
        grad = grads[0] if len(grads) == 1 else torch.cat(grads, dim=2)
        if keep is not None:
            grad = grad * ctx.scale
        x_grad = grad @ weight[:, : grad.shape[2]] if ctx.needs_input_grad[0] else None
        if keep is not None:
            x_grad = x_grad if x_grad is None else dropped(x_grad, keep)
            x = x if x is None else dropped(x, keep)
        return x_grad, None, None, None, None, None, *ctx.trained.grads(grad, x)


class _Added(Kept):
    """What :class:`AddMany` keeps for its backward."""

    scaling: float | Tensor
    trained: Picked


class AddMany(torch.autograd.Function):
    """y + s (g * h) C for every client, written over y past autograd, as :mod:`coterie.nn.bank` does for one.

    Shapes: y [c*b, ..., o], h [c, n, R], g [c, n, e] or None, C [c, R, o], owner [c, R] or None where all experts have
    one rank, s a number or [c, 1, 1]. Keeps h and g, not their product.
    """

    @staticmethod
    def forward(
        ctx: _Added,
        y: Tensor,
        h: Tensor,
        g: Tensor | None,
        columns: Tensor,
        owner: Tensor | None,
        scaling: float | Tensor,
        trained: Picked,
        *_: nn.Parameter,
    ) -> Tensor:
        ctx.save_for_backward(h, g, columns, owner)
        ctx.trained, ctx.scaling = trained, scaling
        result = y.detach()
        result.view(h.shape[0], h.shape[1], -1).baddbmm_(times(weigh(h, g, owner), scaling), columns)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _Added, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        h, g, columns, owner = ctx.saved_tensors
        scaling = ctx.scaling
        flat = y_grad.reshape(h.shape[0], h.shape[1], -1)
        u_grad = times(flat @ columns.mT, scaling)
        g_grad = _per_expert(u_grad * h, g, owner) if g is not None and ctx.needs_input_grad[2] else None
        h_grad = weigh(u_grad, g, owner)
        u = times(weigh(h, g, owner), scaling) if ctx.trained.pieces else h
        grads = (grad.T for grad in ctx.trained.grads(u, flat))
        return y_grad, h_grad, g_grad, None, None, None, None, *grads


def times(values: Tensor, scaling: float | Tensor) -> Tensor:
    """values [c, n, R] * s, in their dtype."""
    return (values * scaling).to(values.dtype)


def weigh(z: Tensor, g: Tensor | None, owner: Tensor | None) -> Tensor:
    """z [c, n, R] with the columns of expert e multiplied by g[..., e]."""
    if g is None:
        return z
    if owner is None:
        return (z.reshape(*g.shape, -1) * g.unsqueeze(-1)).flatten(2)
    return z * g.gather(2, owner.unsqueeze(1).expand(-1, z.shape[1], -1))


def _per_expert(values: Tensor, g: Tensor, owner: Tensor | None) -> Tensor:
    """Sums of values [c, n, R] over the ranks of each expert, [c, n, e] as g."""
    if owner is None:
        return values.reshape(*g.shape, -1).sum(-1)
    return torch.zeros_like(g).scatter_add_(2, owner.unsqueeze(1).expand(-1, values.shape[1], -1), values.to(g.dtype))
