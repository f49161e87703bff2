"""Which of the clients that share a pass can also share a gate, and the mixing of each one's experts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.nn.bank import BankLayer
from coterie.nn.gates import routes_by_output, routes_by_row
from coterie.nn.many_products import weigh


@dataclass(frozen=True)
class Group:
    """Active clients by their positions in the batch. ``index``: the same as a tensor, None for all of them."""

    positions: tuple[int, ...]
    index: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        return values if self.index is None else values.index_select(0, self.index)


def routes_by(gate: str) -> tuple[bool, bool]:
    """Whether the gate routes by the experts' outputs, and by whole rows."""
    return routes_by_output(gate), routes_by_row(gate)


def routes_of(layers: Iterable[BankLayer]) -> set[tuple[bool, bool]]:
    """What :func:`routes_by` says of the layers' gates. One that is constant goes with any other."""
    return {routes_by(layer.gate) for layer in layers if layer.gate != "constant"} or {routes_by("constant")}


def gate_kind(layer: BankLayer | None) -> tuple[object, ...] | None:
    """What layers must have in common to share a gate. A gate with a table is a client's own."""
    if layer is None:
        return None
    options = json.dumps(layer.options, sort_keys=True)
    own = None if layer.table is None else id(layer)
    return layer.gate, options, layer.ranks.each, layer.slots, layer.has_shared, own


def mixed(
    layers: Sequence[BankLayer | None], h: Tensor, g: Tensor | None, owner: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The outputs [c, n, R], and no weights, if a client's gate mixes; else ``h`` [c, n, R] and ``g`` as they are."""
    each = [None if layer is None else layer.mixing(h.shape[2]) for layer in layers]
    if all(mixing is None for mixing in each):
        return h, g
    none = h.new_zeros(h.shape[2], h.shape[2])
    mixing = torch.stack([none if one is None else one.to(h.dtype) for one in each])
    return weigh(h, g, owner) + h @ mixing.mT, None
