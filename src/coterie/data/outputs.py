"""What a forward pass gives a task: logits, or what enters the head where the logits of all tokens are too large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """What enters a decoder's head, ``values`` [b, t, h].

    ``losses`` makes of what enters the head [n, h] and of the labels [n] the cross entropy of each token [n].
    """

    values: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]

    def of(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy [n] of the ``labels`` [n] after the ``tokens`` [n], numbers into b * t.

        It is computed on the device of ``values``, and returned on that of the labels.
        """
        here = self.values.device
        losses = self.losses(self.values.flatten(0, 1).index_select(0, tokens.to(here)), labels.to(here))
        return losses.to(labels.device)


Output = Tensor | Hidden
