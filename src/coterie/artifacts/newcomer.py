"""The model of a run for someone who was not in it: what its clients have in common, from their bundles alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from coterie.adapters.about import About
from coterie.adapters.bundle import BUNDLE_FILE, one_lora, read_bundle
from coterie.ops.lowrank import compact, stacked
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, CoterieError, GateSpec, Key, Part, Tensors

Banks = Sequence[Bank]


def newcomer_bundle(folder: Path) -> tuple[Bank, About]:
    """The bank of a newcomer to the run in ``folder``, and what to know of it.

    Its labels, and a head for them, are the clients' where all have the same; else it has neither.
    Raises :class:`CoterieError` for a folder without clients' bundles, and for gates without a newcomer's form.
    """
    folders = sorted(path.parent for path in (folder / "clients").glob(f"*/{BUNDLE_FILE}"))
    if not folders:
        raise CoterieError(f"no {BUNDLE_FILE} in a client's folder below {folder / 'clients'}; give a finished run")
    read = [read_bundle(path) for path in folders]
    banks, about = [bank for bank, _ in read], read[0][1]
    labels = about.labels if len({of.labels for _, of in read}) == 1 else None
    head = _mean_part(banks, Part.HEAD) if labels or about.task != "classification" else {}
    bank = newcomer_bank(banks)
    return replace(bank, tensors={**bank.tensors, **head}), replace(about, client="", labels=labels)


def newcomer_bank(banks: Banks) -> Bank:
    """What the ``banks`` of all clients have in common, without a head.

    - One LoRA, or a sum of LoRAs, each: the mean of their products B A, exactly.
    - FedLEASE: every expert as its own clients have it, weighed by a softmax over the mean of the clients' routers. The
      slots that stand for a client's own expert are left out: a newcomer has none.
    - FedAMoLE: the shared expert alone, as each client holds other experts of the pool.
    - SmartFed, and other gates over experts that all have: the experts with the mean of the routers.
    - FedDPA: what all clients have, with a gate of 1.
    """
    names = {bank.gate.name for bank in banks}
    if len(names) > 1:
        raise CoterieError(
            f"the clients' gates differ ({', '.join(sorted(names))}), so there is no model for a newcomer"
        )
    make = _BY_GATE.get(names.pop(), _mean_router)
    return make(banks)


def _mean_lora(banks: Banks) -> Bank:
    loras = [one_lora(bank) for bank in banks]
    weights = [bank.scaling / len(banks) for bank in banks]
    if all(_equal(lora, loras[0]) for lora in loras) and len({bank.scaling for bank in banks}) == 1:
        return Bank(loras[0], scaling=banks[0].scaling)
    tensors: dict[Key, Tensor] = {}
    for module in sorted({key.module for lora in loras for key in lora}):
        a, b = Key(module, 0, Part.A), Key(module, 0, Part.B)
        having = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if a in lora]
        tensors[b], tensors[a] = compact(stacked([(lora[b], lora[a]) for lora, _ in having], [w for _, w in having]))
    return Bank(tensors, scaling=1.0)


def _without_own(banks: Banks) -> Bank:
    return Bank(_routed(banks, _owned(banks)), GateSpec("softmax"), banks[0].scaling)


def _mean_router(banks: Banks) -> Bank:
    return Bank(_routed(banks, _common(banks)), banks[0].gate, banks[0].scaling)


def _owned(banks: Banks) -> dict[Key, Tensor]:
    """Every expert as the clients hold it whose own it is: others may hold an older copy (``download = "used"``).

    An expert that is withheld from all others, who hold it with B = 0, is left out.
    """
    experts: dict[Key, Tensor] = {}
    for a in sorted({key for bank in banks for key in bank.tensors if key.part is Part.A}):
        b = a._replace(part=Part.B)
        own = [bank.tensors for bank in banks if bank.gate.options.get("own") == a.expert]
        others = [bank.tensors for bank in banks if bank.gate.options.get("own") != a.expert]
        if own and others and own[0][b].any() and not any(tensors[b].any() for tensors in others):
            continue
        first, *rest = own or others
        if not all(torch.equal(tensors[key], first[key]) for tensors in rest for key in (a, b)):
            raise CoterieError(
                f"the clients hold different versions of expert {a.expert} in {a.module}, so there is no model for a "
                "newcomer; name a client"
            )
        experts |= {a: first[a], b: first[b]}
    return experts


def _routed(banks: Banks, experts: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The ``experts``, which all clients have, and of the routers the mean of these experts' rows."""
    numbers = [_numbers(bank.tensors) for bank in banks]
    routers: dict[Key, Tensor] = {}
    for module, kept in _numbers(experts).items():
        key = Key(module, NO_EXPERT, Part.ROUTER)
        rows = [
            bank.tensors[key][[of[module].index(number) for number in kept]]
            for bank, of in zip(banks, numbers, strict=True)
            if key in bank.tensors
        ]
        routers |= {key: torch.stack(rows).mean(0)} if rows else {}
    return {**experts, **routers}


def _numbers(tensors: Tensors) -> dict[str, list[int]]:
    """The numbers of each module's routed experts, in the order of the router's rows."""
    numbers: dict[str, list[int]] = {}
    for key in sorted(key for key in tensors if key.part is Part.A and key.expert not in (SHARED, FOLDED)):
        numbers.setdefault(key.module, []).append(key.expert)
    return numbers


def _shared_alone(banks: Banks) -> Bank:
    shared = {
        key._replace(expert=0): torch.stack([bank.tensors[key] for bank in banks]).mean(0)
        for key in banks[0].tensors
        if key.expert == SHARED
    }
    if not shared:
        raise CoterieError("the clients have no shared expert, so there is no model for a newcomer; name a client")
    return Bank(shared, scaling=banks[0].scaling)


def _common_alone(banks: Banks) -> Bank:
    return Bank(_common(banks), scaling=banks[0].scaling)


def _common(banks: Banks) -> dict[Key, Tensor]:
    """The experts that all clients have, with the same values."""
    first, *others = banks
    experts = {
        key: value
        for key, value in first.tensors.items()
        if key.part in (Part.A, Part.B)
        and all(key in other.tensors and torch.equal(other.tensors[key], value) for other in others)
    }
    whole = {
        key: value
        for key, value in experts.items()
        if {key._replace(part=Part.A), key._replace(part=Part.B)} <= experts.keys()
    }
    if not whole:
        raise CoterieError("the clients have no expert in common, so there is no model for a newcomer; name a client")
    return whole


def _mean_part(banks: Banks, part: Part) -> dict[Key, Tensor]:
    """The mean over clients of the tensors that are ``part``, by key, over the clients that have it."""
    keys = sorted({key for bank in banks for key in bank.tensors if key.part is part and key.expert == NO_EXPERT})
    return {key: torch.stack([bank.tensors[key] for bank in banks if key in bank.tensors]).mean(0) for key in keys}


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


_BY_GATE: Mapping[str, Callable[[Banks], Bank]] = {
    "constant": _mean_lora,
    "slot_top_k": _without_own,
    "scaled_dot_product": _shared_alone,
    "similarity": _common_alone,
}
