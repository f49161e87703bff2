"""FedAMoLE's reverse selection: the scores by which experts choose clients. m modules, E experts each, n clients.

:mod:`coterie.ops.assign` turns scores into an assignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.ops.assign import Limits
from coterie.ops.streams import stream
from coterie.types import ClientInfo, CoterieError

Scores = NDArray[np.float64]


def affinity(experts: Sequence[Tensor], clients: Sequence[Tensor]) -> Scores:
    """prob [m, E, n]: softmax over clients of (e . t_c) / sqrt r, of the embeddings [E, r] and [n, r] by module."""
    pairs = zip(experts, clients, strict=True)
    scores = torch.stack([e.double() @ _filled(t).double().T for e, t in pairs]) * experts[0].shape[-1] ** -0.5
    return np.asarray(scores.softmax(dim=-1).numpy())


def likeness(holds: Sequence[Tensor], clients: Sequence[Tensor]) -> Scores:
    """How alike each client and each expert's holders are, [m, E, n]: :func:`alike`, as the mean over the holders.

    ``holds`` [E, n] by module; 0 for an expert that nobody holds.
    """
    held = torch.stack(list(holds)).double()
    return np.asarray((held / held.sum(dim=2, keepdim=True).clamp(min=1) @ torch.from_numpy(alike(clients))).numpy())


def alike(clients: Sequence[Tensor]) -> Scores:
    """How alike every two clients are, [n, n]: mean cosines of the embeddings [n, r] by module.

    What all clients share is taken off first. A pair of clients has one cosine, the mean over the modules: a module's
    projection is random and shows a few directions only. A client without embeddings is like nobody: its cosines are 0.
    """
    centred = torch.stack([_centred(t.double()) for t in clients])
    units = torch.nn.functional.normalize(centred, dim=-1, eps=1e-12)
    return np.asarray((units @ units.transpose(1, 2)).mean(dim=0).numpy())


def replied(clients: Mapping[str, Tensor]) -> Tensor:
    """Which clients have embeddings, [n] bool, of those by module [n, r]."""
    return torch.stack([t.any(dim=1) for t in clients.values()]).any(dim=0)


def knowingly(holds: Tensor, known: Tensor) -> Tensor:
    """``holds`` [E, n], of each expert only the holders that it chose by their embeddings: ``known`` [n].

    If there are none, the first holder alone: between holders of two domains an expert would stay.
    """
    chosen = holds & known
    first = holds & (holds.cumsum(dim=1) == 1)
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, first)


def at_random(shape: tuple[int, int, int], seed: int, rnd: int) -> Scores:
    """prob [m, E, n] of random scores."""
    scores = torch.randn(shape, generator=stream(seed, "assignment", rnd), dtype=torch.float64)
    return np.asarray(scores.softmax(dim=-1).numpy())


def by_group(random: Scores, clients: Sequence[ClientInfo]) -> Scores:
    """``random`` scores [m, E, n], raised where a client is of the expert's group: expert e has that of client e mod n.

    ``clients`` are in the order of the scores. Raises :class:`CoterieError` for a client without a group.
    """
    if unknown := [c.id for c in clients if c.group is None]:
        raise CoterieError(f'assignment = "oracle" needs a group for every client; set one for {unknown[0]} in [data]')
    groups = np.array([c.group for c in clients])
    of_experts = groups[np.arange(random.shape[1]) % len(clients)]
    raised: Scores = random + (of_experts[:, None] == groups)
    return raised


def with_inertia(prob: Scores, holds: Sequence[Tensor], inertia: float) -> Scores:
    """``prob`` [m, E, n], more by ``inertia`` standard deviations of its module where the client holds the expert.

    ``holds`` [E, n] by module. What :func:`coterie.ops.assign.assign` makes of this is optimal for affinity and bonus
    together. In standard deviations, because a module's prob can differ by a few per cent among all clients.
    """
    if inertia == 0:
        return prob
    bonus = inertia * prob.std(axis=(1, 2), keepdims=True)
    return cast(Scores, prob + bonus * torch.stack(list(holds)).numpy())


def within_reach(limits: Limits, experts: int, clients: int) -> Limits:
    """``limits``, lowered where E ``experts`` cannot meet them for more ``clients`` than there were at the start.

    All experts together make E * ``clients_per_expert`` picks. Where these are too few for every client's least, the
    least is an equal share, rounded down. Homogeneous, where clients cannot share them evenly: their numbers of experts
    differ by at most one.
    """
    picks = experts * limits.clients_per_expert
    least, most = picks // clients, -(-picks // clients)
    if limits.homogeneous and least < most:
        return replace(limits, homogeneous=False, min_experts=least, max_experts=most)
    return replace(limits, min_experts=min(limits.min_experts, least))


def running_mean(before: Tensor, new: Tensor, memory: float) -> Tensor:
    """``memory`` * before + (1 - memory) * new [r]; ``new`` where ``before`` is 0: there is none yet."""
    return memory * before + (1 - memory) * new if memory and bool(before.any()) else new


def best_for_one_more(holds: Tensor, scores: NDArray[np.float64], least: int) -> list[int]:
    """The experts with the largest ``scores`` [E] of one more client, in order of their numbers.

    As many as the n holders in ``holds`` [E, n] have on average, and at least ``least``; first those that are held.
    """
    number = min(max(round(float(holds.sum()) / holds.shape[1]), least), len(holds))
    best = np.argsort(-np.where(holds.any(dim=1), scores, -np.inf), kind="stable")
    return sorted(int(e) for e in best[:number])


def _filled(t: Tensor) -> Tensor:
    """Token embeddings [n, r]; a client without any gets the mean of the others."""
    known = t.any(dim=1, keepdim=True)
    return torch.where(known, t, t.sum(0) / known.sum().clamp(min=1))


def _centred(t: Tensor) -> Tensor:
    """Token embeddings [n, r] less the mean of the clients that have any; 0 for the others."""
    known = t.any(dim=1, keepdim=True)
    return (t - t.sum(0) / known.sum().clamp(min=1)) * known
