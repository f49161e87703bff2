"""The next token of one row, from its logits alone: nothing of the other rows in the pass enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEW_TOKENS = 64  # the most that are generated, where nobody says how many


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn: with temperature 0 the most likely token at each step, else as :func:`next_token` says."""

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Sampling()


def next_token(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """The most likely token, or with a ``temperature`` above 0 one that is drawn from the ``top_p`` most likely ones.

    ``top_p`` keeps the fewest tokens whose probabilities add up to it (nucleus sampling, 1904.09751). Shapes: logits
    [v], on the CPU.
    """
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits.double()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)  # so that no temperature is too small
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    if top_p < 1:
        ordered = ordered * (ordered.cumsum(-1) - ordered < top_p)  # the first one always stays
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])


def penalised(logits: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """``logits`` [v] with those of ``ids`` less likely, as transformers' ``repetition_penalty`` does (1909.05858)."""
    if penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(ids)))
    before = logits[seen]
    return logits.index_copy(0, seen, torch.where(before < 0, before * penalty, before / penalty))


def generator_of(seed: int | None) -> torch.Generator:
    """A random stream of the request's own: from ``seed``, or another one each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
