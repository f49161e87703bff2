"""A trial before anything is served: rows that join a batch get the logits that they would get alone."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.api.cache import RowCache
from coterie.api.served import Served
from coterie.types import CoterieError

_PROMPTS, _NEXT = ((3, 4, 5, 6), (7, 8)), (9, 10)
_TOLERANCE = 0.02  # of the largest logit: a wrong position or mask is far above, rounding in bfloat16 below


def check_decoding(served: Served) -> None:
    """Raise :class:`CoterieError` for a model whose cache cannot hold rows of different lengths."""
    name = type(served.base.model).__name__
    try:
        first, second = (_prompt(served, ids) for ids in _PROMPTS)
        together = first.joined(second, (1, 0))
        together.extend()
        logits = together.run(served, (0, 0), torch.tensor(_NEXT[::-1], device=served.base.device).unsqueeze(1))
        expected = torch.stack([_alone(served, (*ids, next_)) for ids, next_ in zip(_PROMPTS, _NEXT, strict=True)])
    except (TypeError, AttributeError, RuntimeError, IndexError) as fault:
        raise CoterieError(
            f"{name} cannot be served: it does not decode with a cache as others do ({fault})"
        ) from fault
    off = float((logits.flip(0) - expected).abs().max() / expected.abs().max())
    if not off <= _TOLERANCE:
        raise CoterieError(
            f"{name} cannot be served: rows that share its cache get other logits than alone (off by {off:.2g}); "
            "coterie.load gives each client's model"
        )


def _prompt(served: Served, ids: tuple[int, ...]) -> RowCache:
    """The cache after a prompt."""
    tokens = torch.tensor([ids], device=served.base.device)
    cache = RowCache.empty(torch.ones_like(tokens))
    cache.run(served, (0,), tokens)
    return cache


def _alone(served: Served, ids: tuple[int, ...]) -> Tensor:
    """The last logits [v] of a row in one pass, without a cache. Gates by row go by the prompt: all but the last."""
    tokens = torch.tensor([ids], device=served.base.device)
    served.prepare((0,), len(ids))
    mask = served.banks.now.row_mask
    mask.prompt = torch.ones_like(tokens)
    mask.prompt[:, -1] = 0
    try:
        with torch.no_grad():
            logits: Tensor = served.base.model(input_ids=tokens, use_cache=False).logits
    finally:
        mask.prompt = None
    return logits[0, -1].float().cpu()
