"""The two products of :mod:`coterie.nn.bank`, with gradients for what is trained and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Span = tuple[int, int]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Ranks:
    """The experts' ranks, in the bank's order. ``owner`` [R] is the expert of each rank, None where all are alike."""

    each: tuple[int, ...]
    owner: Tensor | None

    @staticmethod
    def of(each: tuple[int, ...], device: torch.device) -> Ranks:
        if len(set(each)) == 1:
            return Ranks(each, None)
        owner = torch.arange(len(each)).repeat_interleave(torch.tensor(each), output_size=sum(each))
        return Ranks(each, owner.to(device))

    def weigh(self, z: Tensor, g: Tensor | None) -> Tensor:
        """z [n, R] with the columns of expert e multiplied by g[:, e]."""
        if g is None:
            return z
        if self.owner is None:
            return (z.reshape(-1, len(self.each), self.each[0]) * g.unsqueeze(-1)).flatten(1)
        return z * g.index_select(1, self.owner)

    def per_expert(self, values: Tensor) -> Tensor:
        """Sums of values [n, R] over the ranks of each expert: [n, e]."""
        experts = len(self.each)
        if self.owner is None:
            return values.reshape(-1, experts, self.each[0]).sum(-1)
        return values @ (self.owner.unsqueeze(1) == torch.arange(experts, device=values.device)).to(values.dtype)


def padded(rows: int) -> int:
    """The number of rows to store for ``rows``: a multiple of 8, or up to 8 as they are.

    A router has an odd number of outputs, and a product that is 39 wide takes 1.6 times as long as one 40 wide (MKL,
    float32, measured); GPUs want multiples of 8 too.
    """
    return rows if rows <= 8 else -(-rows // 8) * 8


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """x with zeros where ``keep`` is false; a product with it would first copy it into numbers like those of x.

    On a CPU the bits of x are multiplied, as integers, by 1 or 0: the same result in a third of the time of ``where``,
    which has no vectorised form there (bfloat16, measured).
    """
    if x.device.type != "cpu":
        return torch.where(keep, x, 0.0)
    return (x.view(_INTEGERS[x.element_size()]) * keep).view(x.dtype)


class Kept(FunctionCtx):
    """The context of a function of autograd, as PyTorch documents it: tensors that are kept may be None."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    save_for_backward: Callable[..., None]


class _Projected(Kept):
    """What :class:`Project` keeps for its backward."""

    shape: torch.Size
    scale: float
    sizes: tuple[int, int]
    spans: Sequence[Span]
    dtypes: list[torch.dtype]


class Project(torch.autograd.Function):
    """h = x~ A^T and p = x R^T, x~ = x with dropout; gradients for x and for the trained spans of W = [A; R; 0] alone.

    Shapes: x [..., i] of n rows, W [>= R + s, i], keep [n, i] or None, h [n, R], p [n, s] or None where s = 0;
    sizes = (R, s).
    Keeps x and keep (a byte each), not x~. h and p are separate tensors: the rest of the layer keeps h for its
    backward, and nothing keeps p.
    """

    @staticmethod
    def forward(
        ctx: _Projected,
        x: Tensor,
        weight: Tensor,
        keep: Tensor | None,
        scale: float,
        sizes: tuple[int, int],
        spans: Sequence[Span],
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.shape, x = x.shape, x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x if trained else None, weight, keep)
        ctx.scale, ctx.sizes, ctx.spans, ctx.dtypes = scale, sizes, spans, [p.dtype for p in trained]
        rank, slots = sizes
        if keep is None:
            both = x @ weight.T
            h, rest = both[:, :rank], both[:, rank:]
        else:
            h, rest = (dropped(x, keep) @ weight[:rank].T).mul_(scale), x @ weight[rank:].T if slots else x
        return h.contiguous(), rest[:, :slots].contiguous() if slots else None

    @staticmethod
    @once_differentiable
    def backward(ctx: _Projected, h_grad: Tensor, p_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, keep = ctx.saved_tensors
        (rank, slots), spans, dtypes, x_grad = ctx.sizes, ctx.spans, ctx.dtypes, None
        if keep is None:
            both = h_grad
            if p_grad is not None:
                both = torch.cat([h_grad, p_grad], dim=1)
                weight = weight[: both.shape[1]]
            if ctx.needs_input_grad[0]:
                x_grad = _product(both, weight, ctx.shape)
            return x_grad, *_NONE_5, *_span_grads(both, x, spans, dtypes)
        h_grad = h_grad * ctx.scale
        if ctx.needs_input_grad[0]:
            x_grad = _product(h_grad, weight[:rank], ctx.shape)
            flat = dropped(x_grad.view(keep.shape), keep)
            if p_grad is not None:
                flat.addmm_(p_grad, weight[rank : rank + slots])
            x_grad = flat.view(ctx.shape)
        count = sum(stop <= rank for _, stop in spans)
        grads = list(_span_grads(h_grad, dropped(x, keep), spans[:count], dtypes[:count])) if count else []
        if p_grad is not None:
            grads += _span_grads(p_grad, x, [(lo - rank, hi - rank) for lo, hi in spans[count:]], dtypes[count:])
        return x_grad, *_NONE_5, *grads


class _Added(Kept):
    """What :class:`Add` keeps for its backward."""

    ranks: Ranks
    scaling: float
    spans: Sequence[Span]
    dtypes: list[torch.dtype]


class Add(torch.autograd.Function):
    """y + s (g * h) C, written over y; gradients for y, h, g and for the trained spans of C's rows.

    Shapes: y [..., o], h [n, R], g [n, e] or None, C [R, o]. Keeps h and g, not their product: that is made again, and
    so are the last columns of h where ``again`` = (x [..., i], rows of A [< R, i]) is given. y is overwritten without
    autograd's knowledge. This is safe, because nothing else uses the base's output. If autograd knew, it would copy the
    gradient of a y that is a view, and reject the y of a quantised Linear. The version counter is shared, so a base
    that kept y for its own backward would raise an error and not give wrong results.
    """

    @staticmethod
    def forward(
        ctx: _Added,
        y: Tensor,
        h: Tensor,
        g: Tensor | None,
        columns: Tensor,
        again: tuple[Tensor, Tensor] | None,
        ranks: Ranks,
        scaling: float,
        spans: Sequence[Span],
        *trained: nn.Parameter,
    ) -> Tensor:
        x, rows = again or (None, None)
        kept = h if rows is None else h[:, : h.shape[1] - len(rows)].contiguous()
        ctx.save_for_backward(kept, g, columns, x, rows)
        ctx.ranks, ctx.scaling, ctx.spans, ctx.dtypes = ranks, scaling, spans, [p.dtype for p in trained]
        result = y.detach()
        result.view(-1, y.shape[-1]).addmm_(ranks.weigh(h, g), columns, alpha=scaling)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _Added, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        h, g, columns, x, rows = ctx.saved_tensors
        if x is not None:
            h = torch.cat([h, x.reshape(-1, x.shape[-1]) @ rows.T], dim=1)
        flat = y_grad.reshape(-1, y_grad.shape[-1])
        u_grad = (flat @ columns.T).mul_(ctx.scaling)
        g_grad = ctx.ranks.per_expert(u_grad * h) if ctx.needs_input_grad[2] else None
        h_grad = ctx.ranks.weigh(u_grad, g)
        u = ctx.ranks.weigh(h, g) if ctx.spans else h
        grads = ((ctx.scaling * grad).T for grad in _span_grads(u, flat, ctx.spans, ctx.dtypes))
        return y_grad, h_grad, g_grad, *_NONE_5, *grads


_NONE_5 = (None,) * 5


def _product(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """left @ right in ``shape``; not a view, so that autograd can add the next gradient in place."""
    result = left.new_empty(shape)
    torch.mm(left, right, out=result.view(-1, shape[-1]))
    return result


def _span_grads(left: Tensor, right: Tensor, spans: Sequence[Span], dtypes: Sequence[torch.dtype]) -> Iterator[Tensor]:
    """left[:, span]^T right for each of the spans (in order), with one product for all."""
    if not spans:
        return
    widths = [hi - lo for lo, hi in spans]
    if sum(widths) == spans[-1][1] - spans[0][0]:
        picked = left[:, spans[0][0] : spans[-1][1]]
    else:
        picked = torch.cat([left[:, lo:hi] for lo, hi in spans], dim=1)
    for part, dtype in zip((picked.T @ right).split(widths), dtypes, strict=True):
        yield part.to(dtype)
