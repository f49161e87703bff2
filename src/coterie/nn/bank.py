"""The one layer of Coterie: a bank of low-rank experts beside a frozen Linear, weighed per token by a gate.

    y = W0 x + s B_cat ( gate(x) * (A_cat x~) )      A_cat [R, d_in], B_cat [d_out, R], R = the sum of the ranks

Two matrix products however many experts (three with dropout, which routing does not see), no loop over experts (but
for experts with a dropout mask each), nothing that waits for the device. The layer is a forward hook on the base
module, which it never touches: quantised Linears, ``Conv1D``, gradient checkpointing and generation with a cache work
as they do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from coterie.nn.gates import balance_loss, gates, routes_by_output
from coterie.ops.streams import stream
from coterie.types import NO_EXPERT, SHARED, Key, Part

Span = tuple[int, int]
SPARSE_FROM = 256  # experts of a matrix from which the sum over the active ones alone was faster (bench/gather.py)


@dataclass
class Pass:
    """What the layers of one attached bank share during a forward pass.

    ``training`` turns dropout on; its mask is a function of ``seed`` and the module's name alone, so that gradient
    checkpointing draws it again. ``mask`` [b, t] marks the tokens that count (None: all) in what is collected:
    ``usage`` by module, [2, e] of sums over tokens, the experts' weights and how many tokens use them; ``embeddings``
    sums over tokens of A_e x and of R x; ``balance`` the load-balance loss of every module. None: not collected.
    ``seen`` counts the tokens behind usage and embeddings by module: a model may run a module several times a pass.
    ``probe`` is shown every layer and its gate weights [n, e], and returns those that the layer goes on with.
    """

    training: bool = False
    seed: int = 0
    mask: Tensor | None = None
    usage: dict[str, Tensor] | None = None
    embeddings: dict[Key, Tensor] | None = None
    balance: list[Tensor] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    probe: Callable[[BankLayer, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Ranks:
    """The experts' ranks, in the bank's order. ``owner`` [R] is the expert of each rank, None where all are alike."""

    each: tuple[int, ...]
    owner: Tensor | None

    @staticmethod
    def of(each: tuple[int, ...], device: torch.device) -> Ranks:
        if len(set(each)) == 1:
            return Ranks(each, None)
        return Ranks(each, torch.arange(len(each)).repeat_interleave(torch.tensor(each)).to(device))

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


@dataclass
class BankLayer:
    """The bank of one module, as a forward hook.

    ``rows`` [>= R + s, d_in] holds A of every expert, then the router of ``slots`` = s outputs, then zeros up to a
    :func:`padded` number; ``columns`` [R, d_out] holds every B transposed. ``experts`` are the experts' numbers.
    The trainable tensors are Parameters that share this storage, so an optimiser step needs no copy; ``row_spans``
    and ``column_spans`` say where, from first to last.
    """

    module: str
    rows: Tensor
    columns: Tensor
    experts: tuple[int, ...]
    ranks: Ranks
    slots: int
    gate: str
    options: dict[str, Any]
    scaling: float
    dropout: float
    own_masks: bool
    now: Pass
    parameters: dict[Key, nn.Parameter] = field(default_factory=dict)
    row_spans: list[Span] = field(default_factory=list)
    column_spans: list[Span] = field(default_factory=list)

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """``output`` + s B_cat (g * A_cat x~), in output's dtype. Shapes: input [..., d_in], output [..., d_out]."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        h, routed, p = self._project(x.to(output.dtype).reshape(-1, x.shape[-1]))
        g = self.weights(p, routed)
        self.record(p, routed, g)
        if g is not None and self.now.probe is not None:
            g = self.now.probe(self, g)
        return self._add(output.contiguous(), h, g)

    def record(self, p: Tensor | None, routed: Tensor, g: Tensor | None) -> None:
        """Collect what the pass asks for, from p [n, s], A_cat x of the routed experts and g [n, e] (None: no gate)."""
        if g is not None:
            if self.now.usage is not None:
                self._record_usage(g, self.now.usage)
            if self.now.balance is not None:
                self.now.balance.append(self._balance(p, routed, g))
        if self.now.embeddings is not None:
            self._record_embeddings(p, routed, self.now.embeddings)
        if self.now.usage is not None or self.now.embeddings is not None:
            tokens = self._counted(routed.new_ones(routed.shape[0], 1)).sum()
            self.now.seen[self.module] = self.now.seen.get(self.module, torch.zeros_like(tokens)) + tokens

    @property
    def has_shared(self) -> bool:
        return SHARED in self.experts

    @property
    def shared_rank(self) -> int:
        return self.ranks.each[0] if self.has_shared else 0

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """h = A_cat x~ [n, R], A_cat x of the routed experts (for gates that route by it), and p = R x [n, s]."""
        rank = self.columns.shape[0]
        dropping = self.now.training and self.dropout > 0
        by_output = routes_by_output(self.gate)
        if not dropping or not (by_output or self.own_masks):
            h, p = self._part(x, 0, rank, self.slots, self._keep(x) if dropping else None)
            return h, h[:, self.shared_rank :], p
        start = self.shared_rank if by_output else rank
        routed, p = self._part(x, start, rank - start, self.slots, None)
        return self._dropped(x), routed, p

    def _dropped(self, x: Tensor) -> Tensor:
        """A_cat x~ [n, R]: one mask for all experts, or one for each."""
        if not self.own_masks:
            return self._part(x, 0, self.columns.shape[0], 0, self._keep(x))[0]
        starts = [sum(self.ranks.each[:i]) for i in range(len(self.experts))]
        parts = zip(self.experts, starts, self.ranks.each, strict=True)
        return torch.cat([self._part(x, start, r, 0, self._keep(x, expert))[0] for expert, start, r in parts], dim=1)

    def _part(self, x: Tensor, start: int, rank: int, slots: int, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The products of x with ``rank`` rows of A from ``start`` on (x~ where ``keep`` is given) and the router."""
        stop = start + rank + slots
        trained = [p for key, p in self.parameters.items() if key.part is not Part.B]
        inside = [(span, p) for span, p in zip(self.row_spans, trained, strict=True) if start <= span[0] < stop]
        spans = [(lo - start, hi - start) for (lo, hi), _ in inside]
        weight = self.rows[start : None if slots else stop].to(x.dtype)
        scale = 1 / (1 - self.dropout)
        h, p = _Project.apply(x, weight, keep, scale, (rank, slots), spans, *(p for _, p in inside))  # type: ignore[no-untyped-call]
        return h, p

    def _add(self, y: Tensor, h: Tensor, g: Tensor | None) -> Tensor:
        trained = [p for key, p in self.parameters.items() if key.part is Part.B]
        columns = self.columns.to(y.dtype)
        if g is not None and self._few_active(y):
            return self._add_active(y, h, g, columns)
        result: Tensor = _Add.apply(y, h, g, columns, self.ranks, self.scaling, self.column_spans, *trained)  # type: ignore[no-untyped-call]
        return result

    def _few_active(self, y: Tensor) -> bool:
        """Whether so few of so many frozen rank-1 experts are active that to touch these alone is faster."""
        k, experts = self.options.get("k", 0) if self.gate == "top_k" else 0, len(self.experts)
        alike = len(self.columns) == experts and not self.column_spans and not self.has_shared
        measured = y.device.type == "cpu" and y.dtype == torch.float32
        return measured and alike and experts >= SPARSE_FROM and 0 < 16 * k <= experts

    def _add_active(self, y: Tensor, h: Tensor, g: Tensor, columns: Tensor) -> Tensor:
        """y + s (g * h) C over the active experts' rows of C alone: k of N per token."""
        picks = g.detach().topk(self.options["k"], dim=-1, sorted=False).indices
        weights = self.scaling * g.gather(1, picks) * h.gather(1, picks)
        return y + functional.embedding_bag(picks, columns, per_sample_weights=weights, mode="sum").reshape(y.shape)

    def _keep(self, x: Tensor, *expert: int) -> Tensor:
        """Which numbers of x [n, i] dropout keeps, each with odds 1 - p to the nearest 1/65536.

        Four numbers share a draw of 64 bits: on a CPU that takes a quarter of ``bernoulli_``'s time, measured.
        """
        generator = stream(self.now.seed, self.module, *expert)
        if x.device.type != "cpu":
            generator = torch.Generator(x.device).manual_seed(generator.initial_seed())
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
        return (bits >= min(round(self.dropout * 2**16), 2**16 - 1) - 2**15).view(x.shape)

    def weights(self, p: Tensor | None, routed: Tensor) -> Tensor | None:
        """The gate's weights [n, e], the shared expert's too, from p [n, s] and A_cat x of the routed experts."""
        if self.has_shared and len(self.experts) == 1:
            return None  # there is nothing to route over
        g = gates()[self.gate](p, self._by_expert(routed), **self.options)
        if g is None or not self.has_shared:
            return g
        return torch.cat([g.new_ones(g.shape[0], 1), g], dim=1)

    def _by_expert(self, routed: Tensor) -> Tensor | None:
        """z [n, e, r], or None where the routed experts' ranks differ or were not computed."""
        ranks = self.ranks.each[1:] if self.has_shared else self.ranks.each
        if len(set(ranks)) != 1 or routed.shape[1] != sum(ranks):
            return None
        return routed.reshape(-1, len(ranks), ranks[0])

    def _balance(self, p: Tensor | None, routed: Tensor, g: Tensor) -> Tensor:
        counted = None if self.now.mask is None else self.now.mask.reshape(-1)
        return balance_loss(self.gate, p, self._by_expert(routed), g[:, int(self.has_shared) :], counted)

    def _record_usage(self, g: Tensor, usage: dict[str, Tensor]) -> None:
        real = self._counted(g)
        counted = torch.stack([real.sum(0), (real > 0).double().sum(0)])
        usage[self.module] = usage.get(self.module, torch.zeros_like(counted)) + counted

    def _record_embeddings(self, p: Tensor | None, routed: Tensor, sums: dict[Key, Tensor]) -> None:
        numbers, ranks = self.experts[int(self.has_shared) :], self.ranks.each[int(self.has_shared) :]
        parts = dict(zip(numbers, self._counted(routed).sum(0).split(list(ranks)), strict=True))
        if p is not None:
            parts[NO_EXPERT] = self._counted(p).sum(0)
        for number, part in parts.items():
            key = Key(self.module, number, Part.EMBEDDING)
            sums[key] = sums[key] + part if key in sums else part

    def _counted(self, values: Tensor) -> Tensor:
        """values [n, ...] in float64 with zeros for the tokens that do not count."""
        real = values.detach().double()
        return real if self.now.mask is None else real * self.now.mask.reshape(-1, 1).to(real.dtype)


class _Project(torch.autograd.Function):
    """h = x~ A^T and p = x R^T, x~ = x with dropout; gradients for x and for the trained spans of W = [A; R; 0] alone.

    Shapes: x [n, i], W [>= R + s, i], keep [n, i] or None, h [n, R], p [n, s] or None where s = 0; sizes = (R, s).
    Keeps x and keep (a byte each), not x~. h and p are tensors of their own: the rest of the layer keeps h for its
    backward, and nobody keeps p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        keep: Tensor | None,
        scale: float,
        sizes: tuple[int, int],
        spans: Sequence[Span],
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x if trained else None, weight, keep)
        ctx.scale, ctx.sizes, ctx.spans, ctx.dtypes = scale, sizes, spans, [p.dtype for p in trained]
        rank, slots = sizes
        if keep is None:
            both = x @ weight.T
            h, rest = both[:, :rank], both[:, rank:]
        else:
            h, rest = (x * keep @ weight[:rank].T).mul_(scale), x @ weight[rank:].T if slots else x
        return h.contiguous(), rest[:, :slots].contiguous() if slots else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h_grad: Tensor, p_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, keep = ctx.saved_tensors
        (rank, slots), spans, dtypes, x_grad = ctx.sizes, ctx.spans, ctx.dtypes, None
        of_a, of_router = weight[:rank], weight[rank : rank + slots]
        if keep is None:
            both = h_grad if p_grad is None else torch.cat([h_grad, p_grad], dim=1)
            x_grad = both @ weight[: both.shape[1]] if ctx.needs_input_grad[0] else None
            return x_grad, *_NONE_5, *_span_grads(both, x, spans, dtypes)
        h_grad = h_grad * ctx.scale
        if ctx.needs_input_grad[0]:
            x_grad = (h_grad @ of_a).mul_(keep)
            x_grad = x_grad if p_grad is None else x_grad.addmm_(p_grad, of_router)
        count = sum(stop <= rank for _, stop in spans)
        grads = list(_span_grads(h_grad, x * keep, spans[:count], dtypes[:count])) if count else []
        if p_grad is not None:
            grads += _span_grads(p_grad, x, [(lo - rank, hi - rank) for lo, hi in spans[count:]], dtypes[count:])
        return x_grad, *_NONE_5, *grads


class _Add(torch.autograd.Function):
    """y + s (g * h) C, written over y; gradients for y, h, g and for the trained spans of C's rows.

    Shapes: y [..., o], h [n, R], g [n, e] or None, C [R, o]. Keeps h and g, not their product: that is made again.
    y is written past autograd, which need not know (no one computes with the base's output again): told of it, it
    would copy the gradient of a y that is a view, and refuse the y of a quantised Linear. The version counter is
    shared, so a base that kept y for its own backward would raise an error, not go wrong.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        g: Tensor | None,
        columns: Tensor,
        ranks: Ranks,
        scaling: float,
        spans: Sequence[Span],
        *trained: nn.Parameter,
    ) -> Tensor:
        ctx.save_for_backward(h, g, columns)
        ctx.ranks, ctx.scaling, ctx.spans, ctx.dtypes = ranks, scaling, spans, [p.dtype for p in trained]
        result = y.detach()
        result.view(-1, y.shape[-1]).addmm_(ranks.weigh(h, g), columns, alpha=scaling)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        h, g, columns = ctx.saved_tensors
        flat = y_grad.reshape(-1, y_grad.shape[-1])
        u_grad = (flat @ columns.T).mul_(ctx.scaling)
        g_grad = ctx.ranks.per_expert(u_grad * h) if ctx.needs_input_grad[2] else None
        h_grad = ctx.ranks.weigh(u_grad, g)
        u = ctx.ranks.weigh(h, g).mul(ctx.scaling) if ctx.spans else h
        grads = (grad.T for grad in _span_grads(u, flat, ctx.spans, ctx.dtypes))
        return y_grad, h_grad, g_grad, None, None, None, None, *grads


_NONE_5 = (None,) * 5


def _span_grads(left: Tensor, right: Tensor, spans: Sequence[Span], dtypes: Sequence[torch.dtype]) -> Iterator[Tensor]:
    """left[:, span]^T right for each of the spans (in order), with one product for each run of spans that touch."""
    start = stop = -1
    whole = left
    for (lo, hi), dtype in zip(spans, dtypes, strict=True):
        if hi > stop:
            start, stop = lo, _run_end(spans, lo)
            whole = left[:, start:stop].T @ right
        yield whole[lo - start : hi - start].to(dtype)


def _run_end(spans: Sequence[Span], start: int) -> int:
    stop = start
    for lo, hi in spans:
        stop = hi if lo == stop else stop
    return stop
