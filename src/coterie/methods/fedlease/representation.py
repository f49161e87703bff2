"""A client's representation: what the targets of the frozen base take in, on average over the client's rows.

The client measures it in one forward pass, without training. By module it is the mean over rows of m / |m|, with m the
mean of the module's input over a row's tokens (``directions`` of :class:`~coterie.requests.Observed`): it is no longer
than 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.methods.parts import Shapes, part_of
from coterie.ops.mean import mean
from coterie.types import NO_EXPERT, Bank, BaseSpec, ClientId, ClientResult, Key, Part, Reply, Tensors


def without_experts(bank: Bank) -> Bank:
    """The bank with every B zero: the base alone, with all targets."""
    return replace(bank, tensors={k: torch.zeros_like(v) if k.part is Part.B else v for k, v in bank.tensors.items()})


def representation_shapes(base: BaseSpec) -> Shapes:
    """The shapes of a representation: a vector as wide as its input for every target."""
    return {Key(t.name, NO_EXPERT, Part.EMBEDDING): (t.d_in,) for t in base.targets}


def representation_of(tensors: Tensors, expert: int = NO_EXPERT) -> list[Tensor]:
    """The representation among ``tensors``, by module, or of the cluster ``expert`` among a state's ``starts``.

    A vector longer than 1, which no mean of rows is, is scaled to 1: a client cannot outweigh the others.
    """
    of = {key: value for key, value in part_of(tensors, Part.EMBEDDING).items() if key.expert == expert}
    return [_cut(of[key]) for key in sorted(of)]


def mean_representations(clusters: Mapping[ClientId, int], warm: Mapping[ClientId, Tensors]) -> dict[Key, Tensor]:
    """The mean representation of each cluster under its number; empty if the clients sent none.

    Every client's vectors are cut as in :func:`representation_of`, before the mean is taken. Short ones stay short:
    they are means of rows that differ.
    """
    means: dict[Key, Tensor] = {}
    for expert in sorted(set(clusters.values())):
        sent: Sequence[Tensors] = [
            {key: _cut(value) for key, value in part_of(warm[c], Part.EMBEDDING).items()}
            for c in sorted(clusters)
            if clusters[c] == expert and c in warm
        ]
        if sent and sent[0]:
            of = mean(sent, [1.0] * len(sent))
            means |= {key._replace(expert=expert): value for key, value in of.items()}
    return means


def _cut(vector: Tensor) -> Tensor:
    return vector / max(1.0, float(vector.norm()))


def with_representation(result: ClientResult, representation: Tensors) -> ClientResult:
    """The result with the representation in its reply."""
    return replace(result, reply=replace(result.reply, tensors={**result.reply.tensors, **representation}))


def without_representation(replies: Mapping[ClientId, Reply]) -> dict[ClientId, Reply]:
    """The replies with what was trained alone: no rule of ``[robust]`` should weigh what was measured."""
    return {
        c: replace(r, tensors={k: v for k, v in r.tensors.items() if k.part is not Part.EMBEDDING})
        for c, r in replies.items()
    }
