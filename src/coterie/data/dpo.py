"""Direct preference optimisation (DPO, arXiv 2305.18290): learns from pairs of answers which one people preferred.

    loss = -log sigmoid(m),    m = beta ((log p(y_w|x) - log p_ref(y_w|x)) - (log p(y_l|x) - log p_ref(y_l|x)))

y_w is the answer that was chosen, y_l the one that was rejected, p_ref a reference that does not train. beta times
the gain of an answer over the reference is its reward, m the margin of the rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

Reference = Literal["round", "base"]
Objective = Literal["likelihood", "dpo"]


@dataclass(frozen=True)
class Dpo:
    """``beta`` is the strength of the pull towards the reference.

    ``reference``: what training compares with: ``round``, the bank that it starts from; ``base``, the base without a
    bank. Scores always compare with the base, so that those of different rounds and banks can be compared.
    """

    beta: float = 0.1
    reference: Reference = "round"

    def margins(self, losses: Tensor, reference: Tensor) -> Tensor:
        """The margin of each pair [n], from -log p of its answers [2 n], each pair's chosen one first, and log p_ref of
        both [n, 2]."""
        gains = -losses.view(-1, 2) - reference
        return self.beta * (gains[:, 0] - gains[:, 1])

    def loss(self, margins: Tensor) -> Tensor:
        """The sum of the pairs' losses."""
        return -functional.logsigmoid(margins).sum()
