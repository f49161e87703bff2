"""FedAMoLE's reverse selection: the scores by which experts choose clients. m modules, E experts each, n clients.

:mod:`coterie.ops.assign` turns scores into an assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def fitting(experts: Tensor, clients: Tensor, new: Tensor, number: int) -> list[int]:
    """The ``number`` experts that give a new client the largest prob, in order; of one module.

    ``experts`` [E, r] and ``clients`` [n, r] are the embeddings of those that were there, ``new`` [r] the new client's.
    """
    prob = affinity([experts], [torch.cat([clients, new.unsqueeze(0)])])[0, :, -1]
    return sorted(int(e) for e in np.argsort(-prob, kind="stable")[:number])


def _filled(t: Tensor) -> Tensor:
    """Token embeddings [n, r]; a client without any gets the mean of the others."""
    known = t.any(dim=1, keepdim=True)
    return torch.where(known, t, t.sum(0) / known.sum().clamp(min=1))
