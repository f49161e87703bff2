"""The one layer of Coterie: a bank of low-rank experts beside a frozen Linear, weighed per token by a gate.

    y = W0 x + s B_cat ( gate(x) * (A_cat x~) )      A_cat [R, d_in], B_cat [d_out, R], R = the sum of the ranks

Two matrix products however many experts (three with dropout, which routing does not see), no loop over experts (but
for experts with a dropout mask each), nothing that waits for the device. The layer is a forward hook on the base
module, which it never touches: quantised Linears, ``Conv1D``, gradient checkpointing and generation with a cache work
as they do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.nn.gates import balance_loss, gate_named, mixes, routes_by_output, routes_by_row
from coterie.nn.per_row import PerRow, watched
from coterie.nn.products import Add, Project, Ranks, Span, padded
from coterie.nn.rows import RowMask, RowScores, row_directions
from coterie.ops.mixing import mixing_of, sizes_of
from coterie.ops.streams import stream
from coterie.types import FOLDED, NO_EXPERT, SHARED, Key, Part

SPARSE_FROM = 256  # from this many experts, summing only the active ones was faster (bench/gather.py)
KEPT_PART = 10  # A_cat x is kept up to 1/KEPT_PART of the size of x, rounded up to a multiple of 8


@dataclass
class Pass:
    """What the layers of one attached bank share during a forward pass.

    ``training`` turns dropout on; its mask is a function of ``seed`` and the module's name alone, so that gradient
    checkpointing draws it again. ``mask`` [b, t] marks the tokens that count in the statistics; None: all.

    The statistics; None means that one is not collected:
    ``usage``, by module: sums over tokens [2, e], of the size of each expert's weight (with ``signed``, of the weight
    itself) and of the tokens that use it;
    ``embeddings``: sums over tokens of A_e x and of R x;
    ``directions``: sums over rows of what a gate by row routes by, and the number of rows;
    ``balance``: the load-balance loss of every module;
    ``seen``: the tokens behind usage and embeddings by module, because a model may run a module several times a pass.

    ``rows`` marks the tokens that a gate by row averages. ``head`` is the number of the head in use, if the bank has
    several. ``probe`` receives every layer with its gate weights [n, e], and returns the weights to continue with.
    ``per_row`` collects what the gradient of each row is made of; parameters then get no gradient from the layers.
    """

    training: bool = False
    seed: int = 0
    head: int = 0
    mask: Tensor | None = None
    usage: dict[str, Tensor] | None = None
    signed: bool = False
    embeddings: dict[Key, Tensor] | None = None
    directions: dict[str, tuple[Tensor, int]] | None = None
    rows: RowMask = field(default_factory=RowMask)
    balance: list[Tensor] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    probe: Callable[[BankLayer, Tensor], Tensor] | None = None
    per_row: PerRow | None = None

    @property
    def collects(self) -> bool:
        """Whether the gate weights of a pass are collected."""
        return not (self.usage is None and self.balance is None and self.embeddings is None)


@dataclass
class BankLayer:
    """The bank of one module, as a forward hook.

    ``rows`` [>= R + s, d_in] holds A of every expert, then the router of ``slots`` = s outputs, then zeros up to a
    :func:`padded` number; ``columns`` [R, d_out] holds every B transposed. ``experts`` are the experts' numbers.
    The trainable tensors are Parameters that share this storage, so an optimiser step needs no copy; ``row_spans``
    and ``column_spans`` say where, from first to last. ``table`` [e, c] is the router of a gate that is marked with
    :func:`~coterie.nn.gates.by_expert`; it is not among ``rows`` and ``parameters``.
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
    row_scores: RowScores = field(default_factory=RowScores)
    table: nn.Parameter | None = None

    def __call__(
        self, base: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        """``output`` + s B_cat (g * A_cat x~), in output's dtype. Shapes: input [..., d_in], output [..., d_out]."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        x = x.to(output).contiguous()  # else each product would keep a copy of its own
        h, routed, p = self._project(x)
        if p is not None and routes_by_row(self.gate):
            p = self.row_scores.spread(x, p, self.now.rows)
        g = self.spread(self.weights(p, routed), h)
        self.record(p, routed, g)
        if self.now.directions is not None:
            self.record_directions(row_directions(x.detach(), self.now.rows))
        if g is not None and self.now.probe is not None:
            g = self.now.probe(self, g)
        h, g = self._mixed(h, g)
        return self._add(output.contiguous(), h, g, self._again(x, g))

    def record(self, p: Tensor | None, routed: Tensor, g: Tensor | None) -> None:
        """Collect what the pass asks for, from p [n, s], A_cat x of the routed experts and g [n, e] (None: no gate)."""
        if g is not None:
            if self.now.usage is not None:
                self._record_usage(self._used(g), self.now.usage)
            if self.now.balance is not None:
                self.now.balance.append(self._balance(p, routed, g))
        if self.now.embeddings is not None:
            self._record_embeddings(p, routed, self.now.embeddings)
        if self.now.usage is not None or self.now.embeddings is not None:
            tokens = self._counted(routed.new_ones(routed.shape[0], 1)).sum()
            self.now.seen[self.module] = self.now.seen.get(self.module, torch.zeros_like(tokens)) + tokens

    def record_directions(self, directions: Tensor) -> None:
        """Add up the directions [b, i] of rows."""
        assert self.now.directions is not None
        total, number = self.now.directions.get(self.module, (torch.zeros((), device=directions.device), 0))
        self.now.directions[self.module] = total + directions.double().sum(0), number + len(directions)

    @property
    def has_shared(self) -> bool:
        return SHARED in self.experts

    @property
    def shared_rank(self) -> int:
        return self.ranks.each[0] if self.has_shared else 0

    @property
    def folded_rank(self) -> int:
        """How many ranks, the first ones, see no dropout: they stand for what was added to the base."""
        return self.ranks.each[0] if FOLDED in self.experts else 0

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """h = A_cat x~ [n, R], A_cat x of the routed experts (for gates that route by it), and p = R x [n, s]."""
        rank = self.columns.shape[0]
        dropping = self.now.training and self.dropout > 0
        by_output = routes_by_output(self.gate)
        if not dropping or not (by_output or self.own_masks or self.folded_rank):
            h, p = self._part(x, 0, rank, self.slots, self._keep(x) if dropping else None)
            return h, h[:, self.shared_rank :], p
        start = self.shared_rank if by_output else rank
        routed, p = self._part(x, start, rank - start, self.slots, None)
        return self._dropped(x), routed, p

    def _dropped(self, x: Tensor) -> Tensor:
        """A_cat x~ [n, R]: one mask for all experts, or one for each; none for the folded expert."""
        folded, rank = self.folded_rank, self.columns.shape[0]
        if not self.own_masks:
            h = self._part(x, folded, rank - folded, 0, self._keep(x))[0]
            return torch.cat([self._part(x, 0, folded, 0, None)[0], h], dim=1) if folded else h
        starts = [sum(self.ranks.each[:i]) for i in range(len(self.experts))]
        parts = zip(self.experts, starts, self.ranks.each, strict=True)
        made = (
            self._part(x, start, r, 0, None if expert == FOLDED else self._keep(x, expert))[0]
            for expert, start, r in parts
        )
        return torch.cat(list(made), dim=1)

    def _part(self, x: Tensor, start: int, rank: int, slots: int, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The products of x with ``rank`` rows of A from ``start`` on (x~ where ``keep`` is given) and the router."""
        stop = start + rank + slots
        trained = [p for key, p in self.parameters.items() if key.part is not Part.B]
        inside = [(span, p) for span, p in zip(self.row_spans, trained, strict=True) if start <= span[0] < stop]
        spans = [(lo - start, hi - start) for (lo, hi), _ in inside]
        weight = self.rows[start : None if slots else stop].to(x.dtype)
        scale = 1 / (1 - self.dropout)
        if self.now.per_row is not None:
            return self._part_by_row(x, weight, (rank, slots), spans, start, self.now.per_row)
        h, p = Project.apply(x, weight, keep, scale, (rank, slots), spans, *(p for _, p in inside))  # type: ignore[no-untyped-call]
        return h, p

    def _add(self, y: Tensor, h: Tensor, g: Tensor | None, again: tuple[Tensor, Tensor] | None) -> Tensor:
        trained = [p for key, p in self.parameters.items() if key.part is Part.B]
        columns = self.columns.to(y.dtype)
        if g is not None and self._few_active(y):
            return self._add_active(y, h, g, columns)
        if self.now.per_row is not None:
            return self._add_by_row(y, h, g, columns, self.now.per_row)
        result: Tensor = Add.apply(y, h, g, columns, again, self.ranks, self.scaling, self.column_spans, *trained)  # type: ignore[no-untyped-call]
        return result

    def _part_by_row(
        self,
        x: Tensor,
        weight: Tensor,
        sizes: tuple[int, int],
        spans: Sequence[Span],
        start: int,
        rows: PerRow,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_part` without dropout; the gradients of its parameters go to ``rows``."""
        rows.check(x, self.module)
        h, p = Project.apply(x, weight, None, 1.0, sizes, [])  # type: ignore[no-untyped-call]
        trained = [key for key in self.parameters if key.part is not Part.B]
        keys = [key for span, key in zip(self.row_spans, trained, strict=True) if start <= span[0] < start + sum(sizes)]
        flat, version = x.detach().reshape(-1, x.shape[-1]), x._version
        for values, low, high in ((h, 0, sizes[0]), (p, sizes[0], sum(sizes))):
            mine = [(k, lo - low, hi - low) for k, (lo, hi) in zip(keys, spans, strict=True) if low <= lo < high]
            if values is None or not mine:
                continue

            def add(grad: Tensor, mine: list[tuple[Key, int, int]] = mine) -> None:
                assert x._version == version, f"the input of {self.module} was overwritten"
                for key, lo, hi in mine:
                    rows.add(key, grad[:, lo:hi], flat)

            watched(values, add)
        return h, p

    def _add_by_row(self, y: Tensor, h: Tensor, g: Tensor | None, columns: Tensor, rows: PerRow) -> Tensor:
        """As :meth:`_add`; the gradients of B go to ``rows``."""
        result: Tensor = Add.apply(y, h, g, columns, None, self.ranks, self.scaling, [])  # type: ignore[no-untyped-call]
        keys = [key for key in self.parameters if key.part is Part.B]

        def add(grad: Tensor) -> None:
            u = self.scaling * self.ranks.weigh(h.detach(), None if g is None else g.detach())
            flat = grad.reshape(-1, grad.shape[-1])
            for key, (lo, hi) in zip(keys, self.column_spans, strict=True):
                rows.add(key, flat, u[:, lo:hi])

        return watched(result, add) if keys else result

    def _again(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """x and the last rows of A, whose product the backward pass computes again; None: the product is kept.

        x is kept anyway, for the gradients of A and of the router. With many experts, A_cat x would add much to it.
        With 16 experts of rank 8 at d = 768, computing it again saves 5% of the memory and costs 3% of the time. This
        is not done with dropout, where x~ would have to be computed again too.
        """
        rank, keeps = self.columns.shape[0], padded(x.shape[-1] // KEPT_PART)
        dropping, by_output = self.now.training and self.dropout > 0, routes_by_output(self.gate)
        if g is None or rank <= keeps or dropping or by_output or not self.row_spans or not torch.is_grad_enabled():
            return None
        return x.detach(), self.rows[keeps:rank].to(x.dtype)

    def _few_active(self, y: Tensor) -> bool:
        """Whether so few of the frozen rank-1 experts are active that it is faster to compute only those."""
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
        """Which numbers of x dropout keeps, [n, i], each with probability 1 - p, to the nearest 1/65536.

        Four numbers share a draw of 64 bits. Measured on a CPU, this takes a quarter of ``bernoulli_``'s time.
        """
        generator = stream(self.now.seed, self.module, *expert)
        if x.device.type != "cpu":
            generator = torch.Generator(x.device).manual_seed(generator.initial_seed())
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
        return (bits >= min(round(self.dropout * 2**16), 2**16 - 1) - 2**15).view(-1, x.shape[-1])

    def weights(self, p: Tensor | None, routed: Tensor) -> Tensor | None:
        """The gate's weights [n, e], the shared expert's too, from p [n, s] and A_cat x of the routed experts."""
        if self.has_shared and len(self.experts) == 1:
            return None  # there is nothing to route over
        g = gate_named(self.gate)(p if self.table is None else self.table, self._by_expert(routed), **self.options)
        if g is None or not self.has_shared:
            return g
        return torch.cat([g.new_ones(g.shape[0], 1), g], dim=1)

    def spread(self, g: Tensor | None, like: Tensor) -> Tensor | None:
        """Weights of a table as a view [n, e] for the n tokens of ``like`` [n, R], in its dtype; others as they are."""
        return g if g is None or self.table is None else g.to(like.dtype).expand(len(like), -1)

    def mixing(self, rank: int) -> Tensor | None:
        """What a gate that mixes adds to the weights, [rank, rank], over A x of all experts; None for other gates."""
        if self.table is None or not mixes(self.gate):
            return None
        return mixing_of(self.table, rank, self.shared_rank)

    def _mixed(self, h: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The outputs [n, R] of a gate that mixes, and no weights; ``h`` and ``g`` as they are for other gates."""
        mixing = self.mixing(h.shape[1])
        return (h, g) if mixing is None else (self.ranks.weigh(h, g) + h @ mixing.to(h.dtype).T, None)

    def _by_expert(self, routed: Tensor) -> Tensor | None:
        """z [n, e, r], or None where the routed experts' ranks differ or were not computed."""
        ranks = self.ranks.each[1:] if self.has_shared else self.ranks.each
        if len(set(ranks)) != 1 or routed.shape[1] != sum(ranks):
            return None
        return routed.reshape(-1, len(ranks), ranks[0])

    def _balance(self, p: Tensor | None, routed: Tensor, g: Tensor) -> Tensor:
        counted = None if self.now.mask is None else self.now.mask.reshape(-1).to(g.device)
        return balance_loss(self.gate, p, self._by_expert(routed), g[:, int(self.has_shared) :], counted)

    def _used(self, g: Tensor) -> Tensor:
        """g; for a gate that mixes, how much each expert counts, in g's shape."""
        if self.table is None or not mixes(self.gate):
            return g
        return torch.cat([g[0, : int(self.has_shared)], sizes_of(self.table.detach()).to(g)]).expand_as(g)

    def _record_usage(self, g: Tensor, usage: dict[str, Tensor]) -> None:
        real = self._counted(g)
        weight = real if self.now.signed else real.abs()
        counted = torch.stack([weight.sum(0), (real != 0).double().sum(0)])
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
        return real if self.now.mask is None else real * self.now.mask.reshape(-1, 1).to(real)
