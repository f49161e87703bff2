"""The one layer of Coterie: a bank of low-rank experts beside a frozen Linear, weighed per token by a gate.

    y = W0 x + s B_cat ( gate(x) * (A_cat x~) )      A_cat [R, d_in], B_cat [d_out, R], R = the sum of the ranks

Two matrix products however many experts, no loop over experts, nothing that waits for the device. The layer is a
forward hook on the base module, which it never touches: quantised Linears, ``Conv1D``, gradient checkpointing and
generation with a cache work as they do without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coterie.nn.gates import gates
from coterie.ops.streams import stream
from coterie.types import Key, Part


@dataclass
class Pass:
    """What the layers of one attached bank share during a forward pass.

    ``training`` turns dropout on; its mask is a function of ``seed`` and the module's name alone, so that gradient
    checkpointing draws it again. ``mask`` [b, t] marks real tokens; ``usage`` collects gate statistics if not None.
    """

    training: bool = False
    seed: int = 0
    mask: Tensor | None = None
    usage: dict[str, Tensor] | None = None


@dataclass
class BankLayer:
    """The bank of one module, as a forward hook.

    ``rows`` [R + s, d_in] holds A of every expert, then the router; ``columns`` [R, d_out] holds every B transposed.
    The trainable tensors are Parameters that share this storage, so an optimiser step needs no copy.
    """

    module: str
    rows: Tensor
    columns: Tensor
    ranks: tuple[int, ...]
    gate: str
    options: dict[str, Any]
    has_shared: bool
    scaling: float
    dropout: float
    now: Pass
    parameters: dict[Key, nn.Parameter] = field(default_factory=dict)
    spans: dict[Key, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """``output`` + s B_cat (g * A_cat x~), in output's dtype. Shapes: input [..., d_in], output [..., d_out]."""
        x = (args[0] if args else kwargs["input"]).to(output.dtype)
        x = x.reshape(-1, x.shape[-1])
        rank = self.columns.shape[0]
        if self.now.training and self.dropout > 0:
            h = self._project(self._drop(x), 0, rank)
            p = self._project(x, rank, self.rows.shape[0]) if rank < self.rows.shape[0] else None
        else:
            both = self._project(x, 0, self.rows.shape[0])
            h, p = (both, both[:, rank:]) if rank < self.rows.shape[0] else (both, None)
        g = self._weights(p, h[:, :rank])
        if self.now.usage is not None and g is not None:
            self._record(g)
        return self._add(output.contiguous(), h, g)

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        inside = {
            key: (lo - start, hi - start)
            for key, (lo, hi) in self.spans.items()
            if key.part is not Part.B and start <= lo and hi <= stop
        }
        trained = [self.parameters[key] for key in inside]
        weight = self.rows[start:stop].to(x.dtype)
        result: Tensor = _Project.apply(x, weight, tuple(inside.values()), *trained)
        return result

    def _add(self, y: Tensor, h: Tensor, g: Tensor | None) -> Tensor:
        inside = {key: span for key, span in self.spans.items() if key.part is Part.B}
        trained = [self.parameters[key] for key in inside]
        columns = self.columns.to(y.dtype)
        result: Tensor = _Add.apply(y, h, g, columns, self.ranks, self.scaling, tuple(inside.values()), *trained)
        return result

    def _drop(self, x: Tensor) -> Tensor:
        generator = stream(self.now.seed, self.module)
        if x.device.type != "cpu":
            generator = torch.Generator(x.device).manual_seed(generator.initial_seed())
        keep = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * keep.div_(1 - self.dropout)

    def _weights(self, p: Tensor | None, h: Tensor) -> Tensor | None:
        ranks = self.ranks[1:] if self.has_shared else self.ranks
        routed = h[:, self.ranks[0] :] if self.has_shared else h
        z = routed.unflatten(-1, (len(ranks), ranks[0])) if ranks and len(set(ranks)) == 1 else None
        g = gates()[self.gate](p, z, **self.options)
        if g is None or not self.has_shared:
            return g
        return torch.cat([g.new_ones(g.shape[0], 1), g], dim=1)

    def _record(self, g: Tensor) -> None:
        assert self.now.usage is not None
        real = g if self.now.mask is None else g[self.now.mask.reshape(-1).bool()]
        real = real.detach().double()
        counted = torch.stack([real.sum(0), (real > 0).double().sum(0)])
        self.now.usage[self.module] = self.now.usage.get(self.module, torch.zeros_like(counted)) + counted


class _Project(torch.autograd.Function):
    """h = x W^T; gradients for x and for the trained spans of W's rows alone. x [n, i], W [m, i], h [n, m]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, spans: Sequence[tuple[int, int]], *trained: nn.Parameter
    ) -> Tensor:
        ctx.save_for_backward(x if trained else None, weight)
        ctx.spans, ctx.dtypes = spans, [parameter.dtype for parameter in trained]
        return x @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_grad = h_grad @ weight if ctx.needs_input_grad[0] else None
        grads = ((h_grad[:, lo:hi].T @ x).to(d) for (lo, hi), d in zip(ctx.spans, ctx.dtypes, strict=True))
        return x_grad, None, None, *grads


class _Add(torch.autograd.Function):
    """y += s (g * h) C, in place; gradients for y, h, g and for the trained spans of C's rows.

    Shapes: y [..., o], h [n, >= R], g [n, e] or None, C [R, o]. Keeps h and g, not their product: that is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        g: Tensor | None,
        columns: Tensor,
        ranks: Sequence[int],
        scaling: float,
        spans: Sequence[tuple[int, int]],
        *trained: nn.Parameter,
    ) -> Tensor:
        ctx.save_for_backward(h, g, columns)
        ctx.ranks, ctx.scaling, ctx.spans = ranks, scaling, spans
        ctx.dtypes = [parameter.dtype for parameter in trained]
        y.view(-1, y.shape[-1]).addmm_(_weigh(h[:, : columns.shape[0]], g, ranks), columns, alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        h, g, columns = ctx.saved_tensors
        rank = columns.shape[0]
        flat = y_grad.reshape(-1, y_grad.shape[-1])
        u_grad = (flat @ columns.T).mul_(ctx.scaling)
        z, wide = h[:, :rank], h.shape[1] > rank
        g_grad = _per_expert(u_grad * z, ctx.ranks) if ctx.needs_input_grad[2] else None
        h_grad = h.new_zeros(h.shape) if wide else None
        z_grad = _weigh(u_grad, g, ctx.ranks)
        if h_grad is not None:
            h_grad[:, :rank] = z_grad
        grads = []
        for (lo, hi), dtype in zip(ctx.spans, ctx.dtypes, strict=True):
            u = _weigh(z, g, ctx.ranks)[:, lo:hi]
            grads.append((u.T @ flat).mul_(ctx.scaling).to(dtype).T)
        return y_grad, z_grad if h_grad is None else h_grad, g_grad, None, None, None, None, *grads


def _weigh(z: Tensor, g: Tensor | None, ranks: Sequence[int]) -> Tensor:
    """z [n, R] with the columns of expert e multiplied by g[:, e]."""
    if g is None:
        return z
    if len(set(ranks)) == 1:
        return (z.unflatten(-1, (len(ranks), ranks[0])) * g.unsqueeze(-1)).flatten(-2)
    return z * g.repeat_interleave(torch.tensor(ranks, device=g.device), dim=1, output_size=sum(ranks))


def _per_expert(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """Sums of values [n, R] over the columns of each expert: [n, e]."""
    if len(set(ranks)) == 1:
        return values.unflatten(-1, (len(ranks), ranks[0])).sum(-1)
    return torch.stack([part.sum(-1) for part in values.split(list(ranks), dim=-1)], dim=-1)
