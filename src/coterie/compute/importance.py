"""How much a module's experts matter on some rows: one number per module, from its gate (SmartFed's EEQA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from coterie.data.examples import Batch
from coterie.nn.attach import attached
from coterie.nn.bank import BankLayer, Pass
from coterie.types import Bank

IMPORTANCE = ("first_order", "gate_mass")


def gate_importance(
    model: nn.Module, bank: Bank, batches: Iterable[Batch], loss: Callable[[Batch], Tensor], what: Iterable[str]
) -> dict[str, dict[str, float]]:
    """``[statistic][module]``: means over the real tokens of the batches, summed over a module's routed experts.

    ``first_order``: sum_i |g_i dL/dg_i|, the first-order change of the loss without expert i; L is the sum of the
    examples' losses, so that a token's part does not depend on the batch. ``gate_mass``: sum_i |g_i| ||B_i|| ||A_i||.
    ``loss`` runs the model on a batch and returns L. Modules without a gate are left out.
    """
    wanted, tokens = frozenset(what), 0
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in IMPORTANCE if name in wanted}
    gradients = "first_order" in wanted
    with attached(model, bank) as handle, torch.set_grad_enabled(gradients):
        handle.now.probe = _probe(handle.now, sums)
        for batch in batches:
            handle.now.mask = batch.mask
            value = loss(batch)
            if gradients and value.requires_grad:
                value.backward()
            tokens += int(batch.mask.sum())
    return {name: {m: float(total) / tokens for m, total in by_module.items()} for name, by_module in sums.items()}


def _probe(now: Pass, sums: dict[str, dict[str, Tensor]]) -> Callable[[BankLayer, Tensor], Tensor]:
    def add(statistic: str, module: str, values: Tensor) -> None:
        """Add up values [n, e] over real tokens and experts."""
        real = values.double().sum(1)
        if now.mask is not None:
            real = real * now.mask.reshape(-1).to(real.device)
        sums[statistic][module] = sums[statistic].get(module, 0) + real.sum()

    def probe(layer: BankLayer, g: Tensor) -> Tensor:
        first = int(layer.has_shared)
        if "gate_mass" in sums:
            add("gate_mass", layer.module, g.detach()[:, first:].abs() * _norms(layer)[first:])
        if "first_order" in sums:
            g = g if g.requires_grad else g.detach().requires_grad_()
            kept = g.detach()
            g.register_hook(lambda grad: add("first_order", layer.module, (kept * grad).abs()[:, first:]))
        return g

    return probe


def _norms(layer: BankLayer) -> Tensor:
    """||B_i|| ||A_i|| of every rank, summed over each expert's ranks: [e]."""
    a, b = layer.rows[: len(layer.columns)], layer.columns
    return layer.ranks.per_expert((a.norm(dim=1) * b.norm(dim=1) * layer.scaling).unsqueeze(0))[0]
