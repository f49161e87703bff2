"""The terms of a training's loss that depend on the trained tensors alone: FedProx's pull, HetLoRA's last ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.nn.placement import on_device
from coterie.requests import Train
from coterie.types import CoterieError, Key, Part


@dataclass(frozen=True)
class Penalties:
    """The terms of one client's request in one round, on the parameters that it trains.

    ``pulled`` holds each parameter of the proximal term with its value at the start of the round, ``pairs`` each B
    [d_out, r] and A [r, d_in] whose last ranks count.
    """

    request: Train
    pulled: list[tuple[nn.Parameter, Tensor]]
    pairs: list[tuple[nn.Parameter, nn.Parameter]]

    @staticmethod
    def of(request: Train, parameters: Mapping[Key, nn.Parameter]) -> Penalties:
        """Raises :class:`CoterieError` for a proximal term on a tensor that does not train."""
        keys = sorted(request.proximal.keys) if request.proximal else []
        if fixed := [str(key) for key in keys if key not in parameters]:
            raise CoterieError(f"the proximal term is only for tensors that train; {', '.join(fixed)} do not")
        pulled = [(parameters[key], parameters[key].detach().clone()) for key in keys]
        pairs = {key: key._replace(part=Part.B) for key in sorted(parameters) if key.part is Part.A}
        both = [(parameters[b], parameters[a]) for a, b in pairs.items() if b in parameters]
        return Penalties(request, pulled, both if request.last_ranks else [])

    def loss(self) -> Tensor | None:
        """The sum of the terms as the parameters are now; None if there are none."""
        terms = [*([self._proximal()] if self.pulled else []), *([self._last_ranks()] if self.pairs else [])]
        return sum(terms[1:], terms[0]) if terms else None

    def _proximal(self) -> Tensor:
        weight = self.request.proximal.weight if self.request.proximal else 0.0
        return weight / 2 * _sum((w - start).square().sum() for w, start in self.pulled)

    def _last_ranks(self) -> Tensor:
        last = self.request.last_ranks
        weight, kept = (last.weight, last.kept) if last else (0.0, 0)
        return weight * _sum(b[:, kept:].norm() * a[kept:].norm() for b, a in self.pairs)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum, on the first term's device: the parameters are where their modules are."""
    every = list(terms)
    return torch.stack(on_device(every, every[0].device)).sum()
