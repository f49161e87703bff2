"""Which experts each token of a row used, collected from the gates of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.api.jobs import LayerExperts, TokenExperts
from coterie.api.served import Served
from coterie.nn.many import ManyLayer
from coterie.report.modules import layers_and_matrices
from coterie.types import SHARED


@dataclass
class Gates:
    """The gate weights of one row by module, one tensor [t, e] per pass."""

    weights: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, passed: dict[str, Tensor], row: int, tokens: slice) -> None:
        """Add those of a pass [b, t, e]: of its row ``row``, the tokens ``tokens``."""
        for module, g in passed.items():
            self.weights.setdefault(module, []).append(g[row, tokens])


@contextmanager
def watched(served: Served, wanted: bool) -> Iterator[dict[str, Tensor]]:
    """The gate weights [b, t, e] of the pass in a ``with`` block, by module; nothing where not ``wanted``."""
    passed: dict[str, Tensor] = {}

    def note(layer: ManyLayer, g: Tensor) -> None:
        rows = len(served.banks.now.active) * served.banks.now.rows
        passed[layer.module] = g.detach().float().cpu().view(rows, -1, g.shape[-1])

    served.banks.now.probe = note if wanted else None
    try:
        yield passed
    finally:
        served.banks.now.probe = None


def token_experts(served: Served, client: int, gates: Gates, ids: Sequence[int]) -> TokenExperts:
    """What ``gates`` collected, by layer, for the tokens ``ids`` of a row."""
    named: list[str | None] = served.base.tokenizer.convert_ids_to_tokens(list(ids))
    tokens = tuple(f"<{id_}>" if name is None else name for id_, name in zip(ids, named, strict=True))  # a spare id
    positions = layers_and_matrices(gates.weights)
    by_layer: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for module, parts in gates.weights.items():
        layer = served.banks.layers[module].layers[client]
        if layer is not None and (layer.slots or layer.table is not None):
            weights = torch.cat(parts)[:, : len(layer.experts)]
            by_layer.setdefault((positions[module][0], layer.experts), []).append(weights)
    return TokenExperts(tokens, tuple(_layer(*key, weights) for key, weights in by_layer.items()))


def _layer(layer: str, experts: tuple[int, ...], weights: list[Tensor]) -> LayerExperts:
    mean = torch.stack(weights).mean(0)
    names = tuple("shared" if expert == SHARED else str(expert) for expert in experts)
    return LayerExperts(layer, names, tuple(tuple(round(w, 4) for w in token) for token in mean.tolist()))
