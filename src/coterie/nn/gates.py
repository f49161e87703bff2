"""Gates: how a router's outputs become one weight per token and expert. Every public function here is a gate.

A gate is ``gate(p, z, **options) -> g``, with

* ``p`` [n, s]: the router applied to x (before dropout), one row per token; None for a module without a router; for a
  gate marked with ``by_expert``, the router itself, [e, c];
* ``z`` [n, e, r]: ``A_e x`` of every expert, for gates that route by it; None where the experts' ranks differ;
* ``g`` [n, e]: the weight of every expert, in the bank's order, or [1, e], the same for all tokens; None stands for all
  ones.

Options come from :class:`~coterie.types.GateSpec`. A gate raises :class:`ValueError` for options or shapes that are
not valid: ``attach`` tries it on one row first. To add a gate, add a function of p and z, here or in an installed
package (entry points ``coterie.gates``); a method names it by the function's name. Mark it with ``by_output`` if it
depends on z (else z may be of x~, or None), with ``by_row`` if all tokens of a row weigh alike, with ``by_expert`` if
its router has c numbers for each expert and is not applied to x, and with ``scored`` to give it the load-balance loss
(:func:`balance_loss`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from coterie.plugins import check_new, installed, load
from coterie.types import CoterieError

Gate = Callable[..., Tensor | None]
Scores = Callable[[Tensor | None, Tensor | None], Tensor]
G = TypeVar("G", bound=Gate)

GROUP = "coterie.gates"
_TINY = 1e-24  # a token of zeros divides by this
_SCORES: dict[str, Scores] = {}
_BY_OUTPUT: set[str] = set()
_BY_ROW: set[str] = set()
_BY_EXPERT: set[str] = set()


def scored(scores: Scores) -> Callable[[G], G]:
    """Mark a gate whose experts have the probabilities softmax(scores(p, z))."""

    def mark(gate: G) -> G:
        _SCORES[gate.__name__] = scores
        return gate

    return mark


def by_output(gate: G) -> G:
    """Mark a gate that depends on z = A x, where x is before dropout; the output uses A x~."""
    _BY_OUTPUT.add(gate.__name__)
    return gate


def by_row(gate: G) -> G:
    """Mark a gate that weighs whole rows: p is of the mean over a row's tokens, scaled to length 1 (:mod:`.rows`)."""
    _BY_ROW.add(gate.__name__)
    return gate


def by_expert(gate: G) -> G:
    """Mark a gate whose router is a table [e, c]: c numbers for each routed expert, instead of rows applied to x."""
    _BY_EXPERT.add(gate.__name__)
    return gate


def _routed(p: Tensor | None, z: Tensor | None = None) -> Tensor:
    if p is None:
        raise ValueError("it needs a router, and the bank has none here")
    return p


def _dot(p: Tensor | None, z: Tensor | None) -> Tensor:
    """s_te = (A_e x_t . P x_t) / sqrt r, in float32 at least. Shapes: p [n, r], z [n, e, r], s [n, e]."""
    p = _routed(p)
    if z is None:
        raise ValueError("it needs experts of one rank")
    if p.shape[-1] != z.shape[-1]:
        raise ValueError(f"a token projection of {p.shape[-1]} outputs does not fit experts of rank {z.shape[-1]}")
    wide = torch.promote_types(z.dtype, torch.float32)
    scale = float(z.shape[-1]) ** -0.5
    s: Tensor = (z.to(wide) * p.to(wide).unsqueeze(1)).sum(-1) * scale
    return s


def constant(p: Tensor | None, z: Tensor | None) -> None:
    """g = 1: the plain sum of the experts (one expert: a plain LoRA)."""


@scored(_routed)
def softmax(p: Tensor | None, z: Tensor | None) -> Tensor:
    """g = softmax(p), over all experts. Shapes: p [n, e]."""
    p = _routed(p)
    return _top_softmax(p, p.shape[-1], tuple(range(p.shape[-1])), p.shape[-1])


@scored(_routed)
def top_k(p: Tensor | None, z: Tensor | None, *, k: int, scale: str | float = "one") -> Tensor:
    """g = softmax over the k largest of p, 0 elsewhere (the same as softmax over all, renormalised). p [n, e].

    ``scale`` is what the weights add up to: ``"one"``, a number, or ``"active"``: the number of active experts, so that
    experts that weigh alike each weigh 1, as the ranks of a plain LoRA do (SmartFed, 2512.00902).
    """
    p = _routed(p)
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if scale not in ("one", "active") and (isinstance(scale, str) or not scale > 0):
        raise ValueError(f"scale is {scale!r}; it must be 'one', 'active' or a number above 0")
    active = min(k, p.shape[-1])
    g = _top_softmax(p, active, tuple(range(p.shape[-1])), p.shape[-1])
    if scale == "one":
        return g
    return g * (scale if isinstance(scale, float | int) else active)


def slot_top_k(p: Tensor | None, z: Tensor | None, *, own: int) -> Tensor:
    """FedLEASE's adaptive top-M (2509.15087, section 3.3). Shapes: p [n, 2M-1], g [n, M].

    T = the M largest slots, w = softmax over T, slot j serves expert j for j < M and the client's own expert for
    j >= M; g_e = sum of w over the slots in T that serve e. Only M-1 slots are not the client's own, so its own
    expert is always in; the number of distinct experts in use runs from 1 to M.

    Differs from the paper: the paper lists the own expert's slots first; a permutation of the router's rows.
    """
    p = _routed(p)
    experts = (p.shape[-1] + 1) // 2
    if p.shape[-1] % 2 == 0 or not 0 <= own < experts:
        raise ValueError(f"a router of {p.shape[-1]} slots and own = {own}; M experts have 2M-1 slots and 0 <= own < M")
    serves = (*range(experts), *([own] * (experts - 1)))
    return _top_softmax(p, experts, serves, experts)


@by_output
@scored(_dot)
def scaled_dot_product(p: Tensor | None, z: Tensor | None, *, k: int) -> Tensor:
    """FedAMoLE's gate (2411.19128, section 4.2): s_te = (A_e x_t . P x_t) / sqrt r; softmax over the k largest.

    Shapes: p = P x [n, r], z = A x [n, e, r], g [n, e]. x is the input before dropout in both.
    """
    return top_k(_dot(p, z), None, k=k).to(p.dtype if p is not None else torch.float32)


@by_row
def similarity(p: Tensor | None, z: Tensor | None, *, scale: float) -> Tensor:
    """FedDPA's weights (2403.19211, section 4.3) of two experts: g = (1 - a, a), a = scale * max(p, 0).

    Shapes: p [n, 1], the mean cosine between the token's row and reference rows, g [n, 2].
    """
    p = _routed(p)
    if p.shape[-1] != 1 or not 0 < scale <= 1:
        raise ValueError(f"a router of {p.shape[-1]} outputs and scale = {scale}; one output, and 0 < scale <= 1")
    a = scale * p.clamp_min(0)
    return torch.cat([1 - a, a], dim=-1)


@by_expert
def signed(p: Tensor | None, z: Tensor | None, *, k: int = 0) -> Tensor:
    """g = w, a signed weight for each expert, the same for all tokens: a weighted sum of the experts, no softmax.

    Shapes: p = w [e, 1], g [1, e]. ``k``: only the k largest by |w| are active; 0: all. The gradient reaches the others
    too (straight through), so that they can come back.
    """
    return _largest(_table(p, 1)[:, 0].unsqueeze(0), k)


@by_expert
def mixing(p: Tensor | None, z: Tensor | None) -> Tensor:
    """g = w, a signed weight for each expert of rank 1; with C what one's A finds may reach another's B.

    The layer computes the part with C: see :mod:`coterie.ops.mixing`.

    Shapes: p = [w, C] [e, 1 + e], g [1, e].
    """
    p = _routed(p)
    if p.shape[-1] != 1 + len(p):
        raise ValueError(f"a router of {p.shape[-1]} numbers for each of {len(p)} experts; it must have {1 + len(p)}")
    return p[:, 0].unsqueeze(0)


@by_output
@by_expert
def response(p: Tensor | None, z: Tensor | None, *, k: int = 0) -> Tensor:
    """Weights in the experts' own coordinates: g = w + m * u + U V^T u, where u says how strongly each A responds to x.

    u_e = |A_e x| / (the root mean square of |A x| over the experts): its size depends neither on x's nor on how many
    experts there are. Shapes: p = [w, m, U, V] [e, 2 + 2q], z [n, e, r], g [n, e]. ``k``: as for :func:`signed`, by
    |g|, for every token.
    """
    p = _table(p, 2)
    if z is None:
        raise ValueError("it needs experts of one rank")
    wide = torch.promote_types(z.dtype, p.dtype)
    p, size = p.to(wide), z.to(wide).norm(dim=-1)
    u = size / (size.square().mean(dim=-1, keepdim=True) + _TINY).sqrt()
    left, right = p[:, 2:].chunk(2, dim=1)
    g = p[:, 0] + p[:, 1] * u
    return _largest(g + (u @ right) @ left.T if left.shape[1] else g, k)


def balance_loss(gate: str, p: Tensor | None, z: Tensor | None, g: Tensor, counted: Tensor | None) -> Tensor:
    """n * sum_e mean_t(p_te) f_e of one module (2411.19128, section 4.2), p_t the softmax of the gate's scores.

    f_e is the share of the picks (g > 0) that go to expert e, without a gradient; ``counted`` [n] marks the tokens that
    count, None all of them. Shapes as for gates, the shared expert left out. The loss is 1 if all experts are used
    alike. Raises :class:`ValueError` for a gate without scores.
    """
    if gate not in _SCORES:
        raise ValueError(f"the gate {gate!r} has no load-balance loss; the gates with one are {', '.join(_SCORES)}")
    s = _SCORES[gate](p, z)
    probability = s.to(torch.promote_types(s.dtype, torch.float32)).softmax(dim=-1)
    picks = (g.detach() > 0).to(probability.dtype)
    if counted is None:
        mean, picked = probability.mean(0), picks.sum(0)
    else:
        share = counted.to(probability.dtype).unsqueeze(1)  # sums, not products: autocast would round those
        mean, picked = (share * probability).sum(0) / share.sum(), (share * picks).sum(0)
    return g.shape[-1] * (mean * picked / picked.sum()).sum()


def routes_by_output(gate: str) -> bool:
    """Whether a gate is marked with :func:`by_output`."""
    return gate in _BY_OUTPUT


def routes_by_row(gate: str) -> bool:
    """Whether a gate is marked with :func:`by_row`."""
    return gate in _BY_ROW


def routes_by_expert(gate: str) -> bool:
    """Whether a gate is marked with :func:`by_expert`."""
    return gate in _BY_EXPERT


def mixes(gate: str) -> bool:
    """Whether the layer also mixes the experts' A x (:mod:`coterie.ops.mixing`)."""
    return gate == mixing.__name__


@cache
def gate_named(name: str) -> Gate:
    """The gate called ``name``, of this module or of an installed package (:mod:`coterie.plugins`).

    Raises :class:`CoterieError` that lists the known gates where there is none, and for one that is not a function
    of (p, z) with that name.
    """
    check_new(GROUP, gates())
    if name in gates():
        return gates()[name]
    if name not in installed(GROUP):
        raise CoterieError(f"unknown gate {name!r}; the gates are {', '.join([*gates(), *installed(GROUP)])}")
    gate: Gate = load(installed(GROUP)[name])
    if not inspect.isfunction(gate) or not _is_gate(gate) or gate.__name__ != name:
        raise CoterieError(f"the gate {name!r} must be a function {name}(p, z), not {gate!r}")
    return gate


@cache
def gates() -> dict[str, Gate]:
    """Every gate of this module by name: the public functions of (p, z)."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {name: function for name, function in functions if not name.startswith("_") and _is_gate(function)}


def _is_gate(function: Gate) -> bool:
    return list(inspect.signature(function).parameters)[:2] == ["p", "z"]


def _table(p: Tensor | None, least: int) -> Tensor:
    """``p`` [e, c], if c is ``least`` or that and an even number more."""
    p = _routed(p)
    if p.shape[-1] < least or (p.shape[-1] - least) % 2 or (least == 1 < p.shape[-1]):
        more = "" if least == 1 else ", or an even number more"
        raise ValueError(f"a router of {p.shape[-1]} numbers for each expert; it must have {least}{more}")
    return p


def _largest(g: Tensor, k: int) -> Tensor:
    """``g`` [n, e] with 0 for all but the ``k`` largest by size; the gradient is that of ``g`` itself. 0: all stay."""
    if k < 0:
        raise ValueError(f"k is {k}; it must be at least 0")
    if not 0 < k < g.shape[-1]:
        return g
    kept = torch.zeros_like(g).scatter_(-1, g.detach().abs().topk(k, dim=-1, sorted=False).indices, 1.0)
    return g + (g * (kept - 1)).detach()  # g + (-g) is exactly 0


def _top_softmax(p: Tensor, k: int, serves: tuple[int, ...], experts: int) -> Tensor:
    result: Tensor = _TopSoftmax.apply(p, k, _slots(serves, p.device), experts)  # type: ignore[no-untyped-call]
    return result


@cache  # cached, because creating it again would wait for the device
def _slots(serves: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be kept for a later backward
        return torch.tensor(serves, device=device)


def forget_slots() -> None:
    """Drop what is cached: tensors without numbers may be among it (:mod:`coterie.nn.unloaded`)."""
    _slots.cache_clear()


class _Kept(FunctionCtx):
    """What the softmax keeps for its backward: weights, picks and what the slots serve; p's shape and dtype."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]
    like: tuple[torch.Size, torch.dtype]


class _TopSoftmax(torch.autograd.Function):
    """w = softmax over the k largest of p; g_e = sum of the w of the slots that serve e.

    One function instead of autograd's five, because it keeps 5 bytes per pick (a float32 weight and a uint8 slot)
    where they keep 24. The softmax runs in float32, or in float64 for float64 input.
    """

    @staticmethod
    def forward(ctx: _Kept, p: Tensor, k: int, serves: Tensor, experts: int) -> Tensor:
        values, picks = p.to(torch.promote_types(p.dtype, torch.float32)).topk(k, dim=-1, sorted=False)
        w = values.softmax(dim=-1)
        g = torch.zeros(*p.shape[:-1], experts, dtype=w.dtype, device=p.device)
        g.scatter_add_(-1, serves[picks], w)
        ctx.save_for_backward(w, picks.to(torch.uint8 if p.shape[-1] <= 256 else torch.int32), serves)
        ctx.like = (p.shape, p.dtype)
        return g.to(p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, g_grad: Tensor) -> tuple[Tensor, None, None, None]:
        w, small_picks, serves = ctx.saved_tensors
        shape, dtype = ctx.like
        picks = small_picks.long()
        w_grad = g_grad.to(w.dtype).gather(-1, serves[picks])
        values_grad = w * (w_grad - (w * w_grad).sum(dim=-1, keepdim=True))
        p_grad = torch.zeros(shape, dtype=w.dtype, device=w.device).scatter_(-1, picks, values_grad)
        return p_grad.to(dtype), None, None, None
