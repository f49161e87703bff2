"""A client's routed mixture as one static LoRA: every expert with its mean gate weight, in all tokens alike.

    W x = W0 x + s sum_e mean_t(g_te) B_e A_e x

What a gate decides per token is lost; :func:`cost` says what that costs on rows. The gates ``constant``, ``signed`` and
``mixing`` decide nothing per token: their static form is exact and needs no rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from coterie.adapters.bundle import ALIKE, one_lora
from coterie.artifacts.evaluate import Client
from coterie.compute.client import LocalCompute
from coterie.data.rows import ClientData
from coterie.ops.lowrank import stacked, truncated
from coterie.ops.metrics import Metrics
from coterie.requests import Observe, Score, Usage
from coterie.types import Bank, Key, Part


@dataclass(frozen=True)
class Cost:
    """What the static form costs: the metrics of the routed bank and of the static one on the same ``rows``."""

    data: str
    rows: int
    routed: Metrics
    static: Metrics

    def points(self, metric: str) -> float:
        """The static form's metric less the routed one's, in points (hundredths)."""
        return 100 * (self.static[metric] - self.routed[metric])


def mean_weights(client: Client, rows: ClientData, split: str) -> Usage:
    """The mean weight of each module's experts over the tokens of ``rows``, with its sign.

    Empty for a gate that weighs all texts alike.
    """
    if weighs_alike(client.bank):
        return {}
    observed = LocalCompute(client.workplace, rows, 0).observe(Observe(client.bank, split, ("signed_usage",)))
    return observed.usage


def weighs_alike(bank: Bank) -> bool:
    """Whether the gate weighs the experts of all texts alike, so that a static form needs no rows."""
    return bank.gate.name in ALIKE


def static_bank(bank: Bank, usage: Usage, rank: int | None = None) -> Bank:
    """``bank`` as one expert per module with a gate of 1, and its head.

    Experts weigh what ``usage`` says, and 1 in a module outside it. With the gates ``signed`` and ``mixing``, they
    weigh what the bank says. Its rank is the sum of the experts' ranks, or ``rank``: then the nearest product of that
    rank, by QR and the singular values of a small matrix. Experts that no token uses are left out.
    """
    tensors: dict[Key, Tensor] = {key: value for key, value in bank.tensors.items() if key.part is Part.HEAD}
    if weighs_alike(bank) and bank.gate.name != "constant":
        bank = replace(bank, tensors=one_lora(bank))
    for module in sorted({key.module for key in bank.tensors if key.part is Part.A}):
        keys = sorted(key for key in bank.tensors if key.module == module and key.part is Part.A)
        weight = _weights(usage, module, keys)
        used = [key for key in keys if weight[key]] or keys[:1]
        products = [(bank.tensors[key._replace(part=Part.B)].float(), bank.tensors[key].float()) for key in used]
        product = stacked(products, [weight[key] for key in used])
        if rank is not None and product[0].shape[1] > rank:
            product = truncated(product, rank)
        tensors[Key(module, 0, Part.B)], tensors[Key(module, 0, Part.A)] = product
    return Bank(tensors, scaling=bank.scaling)


def cost(client: Client, static: Bank, rows: ClientData, split: str, data: str) -> Cost:
    """What the routed bank and the ``static`` one score on a split of ``rows``, which ``data`` names."""
    compute = LocalCompute(client.workplace, rows, 0)
    routed, cut = compute.score(Score([client.bank, static], split))
    return Cost(data, routed.examples, {"loss": routed.loss, **routed.metrics}, {"loss": cut.loss, **cut.metrics})


def _weights(usage: Usage, module: str, keys: list[Key]) -> Mapping[Key, float]:
    if module not in usage:
        return dict.fromkeys(keys, 1.0)
    use = usage[module]
    by_number = dict(zip(use.expert, use.weight, strict=True))
    return {key: float(by_number[key.expert]) for key in keys}
