"""The keys and values of rows that join and leave: rows of different lengths share a cache, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from coterie.api.served import Served
from coterie.nn.pretrained import DynamicCache


@dataclass
class RowCache:
    """The cache of the rows in a batch: ``mask`` [b, t] marks their tokens, ``keys_values`` holds [b, h, t, d].

    ``scores`` are what gates by row route by, by module [b, s]: computed from the prompt, and kept for what follows.
    """

    mask: Tensor
    keys_values: DynamicCache
    scores: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def empty(mask: Tensor) -> RowCache:
        """Before the first pass over prompts [b, t]."""
        return RowCache(mask, DynamicCache())

    def run(self, served: Served, clients: Sequence[int], ids: Tensor) -> Tensor:
        """Passes ``ids`` [b, t] of the rows of ``clients`` (sorted), whose mask is set. Returns the last logits, a row
        each [b, v] on the CPU, in float32."""
        served.prepare(clients, ids.shape[1])
        by_row = {name: layer for name, layer in served.banks.layers.items() if layer.by_row}
        for name, layer in by_row.items():
            layer.row_scores.last = self.scores.get(name)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits: Tensor = served.base.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.keys_values,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self.scores = {name: last for name, layer in by_row.items() if (last := layer.row_scores.last) is not None}
        return logits[:, -1].float().cpu()

    def extend(self) -> None:
        """Mark a token more in every row."""
        self.mask = functional.pad(self.mask, (0, 1), value=1)

    def joined(self, other: RowCache, order: Sequence[int]) -> RowCache:
        """The rows of both, in ``order`` (numbers in this one's rows and then the other's)."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        index = torch.tensor(order, device=self.mask.device)

        def both(one: Tensor, two: Tensor) -> Tensor:
            return torch.cat([_left(one, width), _left(two, width)]).index_select(0, index)

        made = RowCache.empty(torch.cat([_wide(self.mask, width), _wide(other.mask, width)]).index_select(0, index))
        for number, (mine, its) in enumerate(zip(self.keys_values.layers, other.keys_values.layers, strict=True)):
            made.keys_values.update(both(mine.keys, its.keys), both(mine.values, its.values), number)
        made.scores = {n: torch.cat([of, other.scores[n]]).index_select(0, index) for n, of in self.scores.items()}
        return made

    def kept(self, rows: Sequence[int]) -> RowCache:
        """The rows with these numbers, without what is padding in all of them."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask.index_select(0, index)
        start = int(mask.any(0).int().argmax())
        made = RowCache.empty(mask[:, start:].contiguous())
        for number, layer in enumerate(self.keys_values.layers):
            keys, values = (of.index_select(0, index)[:, :, start:].contiguous() for of in (layer.keys, layer.values))
            made.keys_values.update(keys, values, number)
        made.scores = {name: of.index_select(0, index) for name, of in self.scores.items()}
        return made


def _left(values: Tensor, width: int) -> Tensor:
    """values [b, h, t, d] with zeros before the tokens, up to ``width``."""
    return functional.pad(values, (0, 0, width - values.shape[2], 0))


def _wide(mask: Tensor, width: int) -> Tensor:
    return functional.pad(mask, (width - mask.shape[1], 0))
