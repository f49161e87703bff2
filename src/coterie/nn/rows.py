"""What a gate by row routes by: the direction of the mean over a row's tokens, the same for every token of the row.

    m_b = mean over row b's tokens that count of x,   p_b = R m_b / |m_b|

Which tokens count comes with the pass: a row's own tokens as the model's attention marks them, or only its prompt, so
that a completion does not weigh itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SMALL = 1e-12


@runtime_checkable
class _Cache(Protocol):
    """What is used of a cache of keys and values."""

    def get_seq_length(self) -> int: ...


@dataclass
class RowMask:
    """Which tokens stand for their rows in a forward pass.

    ``segments`` [b, t] numbers the rows that are packed into each batch row, 0 for padding; None: a batch row is one.
    ``attention`` [b, T] is the mask of the model's last call; None: it had none. ``prompt`` [b, t] marks the tokens
    that stand for their row, if they are fewer than attention marks. ``used``: whether anything needs the mask.
    ``continues``: whether the model's last call came with a cache of tokens before its own. Generation leaves out a
    mask that marks every token, so the mask alone does not tell.
    """

    attention: Tensor | None = None
    prompt: Tensor | None = None
    used: bool = False
    continues: bool = False
    segments: Tensor | None = None

    @property
    def counted(self) -> Tensor | None:
        return self.attention if self.prompt is None else self.prompt

    def follow(self, model: nn.Module) -> RemovableHandle:
        """Read the attention mask of every call of ``model``, until the handle is removed."""

        def read(_: nn.Module, __: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            self.attention = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            self.continues = isinstance(cache, _Cache) and cache.get_seq_length() > 0

        self.used = True
        return model.register_forward_pre_hook(read, with_kwargs=True)


@dataclass
class RowScores:
    """The scores by row of one module. ``last`` [b, s] is reused for the tokens that generation adds to the rows."""

    last: Tensor | None = None

    def spread(self, x: Tensor, p: Tensor, mask: RowMask) -> Tensor:
        """For every token the scores of its row. Shapes: x [b, t, i] or [b, i], p = R x and the result [b * t, s]."""
        x, counted = _by_row(x, mask.counted)
        rows, tokens = x.shape[0], x.shape[1]
        if mask.segments is not None:
            return _of_segments(x, p.view(rows, tokens, -1), counted, mask.segments.to(x.device)).to(p.dtype)
        goes_on = mask.continues or (counted is not None and counted.shape[1] > x.shape[1])
        if goes_on and self.last is not None and len(self.last) == rows:
            scores = self.last
        else:
            scores = _sums(p.view(rows, tokens, -1), counted) / _lengths(_sums(x, counted))
            self.last = scores.detach()
        return scores.repeat_interleave(tokens, dim=0).to(p.dtype)


def row_directions(x: Tensor, mask: RowMask) -> Tensor:
    """m_b / |m_b| of every row. Shapes: x [b, t, i] or [b, i], result [b, i]."""
    total = _sums(*_by_row(x, mask.counted))
    return total / _lengths(total)


def _of_segments(x: Tensor, p: Tensor, counted: Tensor | None, segments: Tensor) -> Tensor:
    """The scores [b * t, s] of the packed row that each token is in. Shapes: x [b, t, i], p [b, t, s]."""
    rows, tokens = segments.shape
    first = torch.arange(rows, device=segments.device).unsqueeze(1) * (tokens + 1)
    at = (first + segments).flatten()

    def sums(values: Tensor) -> Tensor:
        if counted is not None:
            values = values * counted.to(values.dtype).unsqueeze(-1)
        wide = values.flatten(0, 1).to(torch.promote_types(values.dtype, torch.float32))
        return wide.new_zeros(rows * (tokens + 1), wide.shape[-1]).index_add(0, at, wide)

    return (sums(p) / _lengths(sums(x))).index_select(0, at)


def _by_row(x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [b, t, i] and its mask [b, T]. A module may take all tokens of a batch in one list or in one row, or one vector
    per row. Its module may be on another device than the inputs of the model."""
    counted = None if counted is None else counted.to(x.device)
    if counted is not None and x.ndim == 3 and x.shape[0] == 1 < len(counted) and counted.numel() == x.shape[1]:
        return x.view(*counted.shape, -1), counted
    if x.ndim == 3:
        return x, counted
    if counted is not None and counted.numel() == len(x):
        return x.view(*counted.shape, -1), counted
    return x.unsqueeze(1), None


def _sums(values: Tensor, counted: Tensor | None) -> Tensor:
    """The sums [b, k] over the tokens that count, in float32 at least. Shapes: values [b, t, k], counted [b, t]."""
    if counted is not None:
        values = values * counted.to(values.dtype).unsqueeze(-1)  # a product of matrices would round in autocast
    return values.sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return lengths.clamp_min(_SMALL)
