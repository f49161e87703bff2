"""The model of a run for someone who was not in it: what its clients have in common, from their bundles alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from coterie.adapters.about import About
from coterie.adapters.bundle import BUNDLE_FILE, one_lora, read_bundle
from coterie.adapters.read import read_adapter
from coterie.methods.parts import lora_of
from coterie.nn.gates import mixes
from coterie.ops.lowrank import compact, stacked
from coterie.ops.mixing import of_some
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, CoterieError, GateSpec, Key, Part, Tensors

Banks = Sequence[Bank]
Served = Mapping[int, Mapping[tuple[str, Part], Tensor]]  # the server's experts by number, with the scale in B

K = TypeVar("K")


def newcomer_bundle(folder: Path) -> tuple[Bank, About]:
    """The bank of a newcomer to the run in ``folder``, and what to know of it.

    Its labels, and a head for them, are the clients' where all have the same; else it has neither.
    Raises :class:`CoterieError` for a folder without clients' bundles, for gates without a newcomer's form, and where
    nothing says which of the clients' versions of an expert is the newest.
    """
    folders = sorted(path.parent for path in (folder / "clients").glob(f"*/{BUNDLE_FILE}"))
    if not folders:
        raise CoterieError(f"no {BUNDLE_FILE} in a client's folder below {folder / 'clients'}; give a finished run")
    read = [read_bundle(path) for path in folders]
    banks, about = [bank for bank, _ in read], read[0][1]
    labels = about.labels if len({of.labels for _, of in read}) == 1 else None
    routed = _routed_alike(banks)
    head = _mean_part(routed, Part.HEAD) if labels or about.task != "classification" else {}
    served = _served(folder) if _versions(routed) else {}
    if about.method == "fedlease" and (lost := _unclear(routed, served)):  # with download = "used"
        raise CoterieError(
            f"the clients hold different versions of expert {min(lost)}, and {folder / 'experts'} does not have one of "
            "them: restore that folder of the run, or name a client"
        )
    bank = newcomer_bank(banks, served)
    return replace(bank, tensors={**bank.tensors, **head}), replace(about, client="", labels=labels)


def newcomer_bank(banks: Banks, served: Served | None = None) -> Bank:
    """What the ``banks`` of all clients have in common, without a head.

    Of an expert of which clients hold several versions, the newest is the one that the server has, if ``served`` says.

    - One LoRA, or a sum of LoRAs, each: the mean of their products B A, exactly.
    - FedLEASE: every expert as its own clients have it, weighed by a softmax over the mean of the clients' routers. The
      slots that stand for a client's own expert are left out: a newcomer has none.
    - FedAMoLE: the shared expert alone, as each client holds other experts of the pool.
    - SmartFed, FedLEASE with plain top-k or a softmax, and other gates over experts that all have: the experts with the
      mean of the routers.
    - FedDPA: what all clients have, with a gate of 1.

    Clients that have no router yet where others have one count for FedDPA only. No round has drawn them, or FedLEASE
    has put them in no cluster.
    """
    routed = _routed_alike(banks)
    if routed[0].gate.name == "similarity":
        return _common_alone(banks)
    make = _BY_GATE.get(routed[0].gate.name)
    return make(routed) if make else _mean_router(routed, served or {})


def _routed_alike(banks: Banks) -> Banks:
    """The banks with the gate that routes, if any does. Raises :class:`CoterieError` where several do."""
    names = {bank.gate.name for bank in banks}
    routing = (names - {"constant"}) or names
    if len(routing) > 1:
        raise CoterieError(
            f"the clients' gates differ ({', '.join(sorted(routing))}), so there is no model for a newcomer"
        )
    return [bank for bank in banks if bank.gate.name in routing]


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


def _mean_router(banks: Banks, served: Served) -> Bank:
    experts = _alike(banks)
    for number, newest in _newest(banks, served).items():
        if not _withheld(banks, number, newest):
            experts |= newest
    return Bank(_routed(banks, _some(experts)), _usual_gate(banks), banks[0].scaling)


def _usual_gate(banks: Banks) -> GateSpec:
    """The gate that most clients have: a weak device may activate fewer experts (SmartFed's budgets)."""
    gates = [bank.gate for bank in banks]
    return max(gates, key=gates.count)


def _unclear(banks: Banks, served: Served) -> set[int]:
    """The experts of which nothing says which version is the newest. With FedLEASE's own gate, its clients do."""
    return set() if banks[0].gate.name in _BY_GATE else _versions(banks) - _newest(banks, served).keys()


def _served(folder: Path) -> Served:
    """The numbered experts that the server of the run in ``folder`` exported; none where there is no such folder."""
    found = {path: re.fullmatch(r"expert-(\d+)", path.name) for path in sorted((folder / "experts").glob("expert-*"))}
    return {int(match[1]): read_adapter(path).tensors for path, match in found.items() if match}


def _versions(banks: Banks) -> set[int]:
    """The numbers of the experts that all ``banks`` hold, but not with the same values."""
    numbers = [{key.expert for key in bank.tensors if key.part is Part.A and key.expert >= 0} for bank in banks]
    first, *others = banks
    return {
        number
        for number in set.intersection(*numbers)
        if not all(_equal(lora_of(bank.tensors, number), lora_of(first.tensors, number)) for bank in others)
    }


def _newest(banks: Banks, served: Served) -> dict[int, dict[Key, Tensor]]:
    """Of the experts with several versions, the one that the server has, as a client holds it."""
    newest: dict[int, dict[Key, Tensor]] = {}
    for number in sorted(_versions(banks) & served.keys()):
        for bank in banks:
            expert = lora_of(bank.tensors, number)
            with_scale = {
                (key.module, key.part): value * bank.scaling if key.part is Part.B else value
                for key, value in expert.items()
            }
            if _equal(with_scale, served[number]):
                newest[number] = expert
    return newest


def _withheld(banks: Banks, number: int, newest: Tensors) -> bool:
    """Whether all clients that do not hold the ``newest`` version of an expert hold it with B = 0."""
    others = [held for bank in banks if not _equal(held := lora_of(bank.tensors, number), newest)]
    return not any(value.any() for held in others for key, value in held.items() if key.part is Part.B)


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
    """The ``experts``, which all clients have, and of the routers the mean of these experts' rows.

    Of routers that mix, the part that mixes these experts with each other.
    """
    some: Callable[[Tensor, list[int]], Tensor] = of_some if mixes(banks[0].gate.name) else Tensor.__getitem__
    numbers = [_numbers(bank.tensors) for bank in banks]
    routers: dict[Key, Tensor] = {}
    for module, kept in _numbers(experts).items():
        key = Key(module, NO_EXPERT, Part.ROUTER)
        rows = [
            some(bank.tensors[key], [of[module].index(number) for number in kept])
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
    return Bank(_some(_alike(banks)), scaling=banks[0].scaling)


def _alike(banks: Banks) -> dict[Key, Tensor]:
    """The experts that all clients have, with the same values."""
    first, *others = banks
    experts = {
        key: value
        for key, value in first.tensors.items()
        if key.part in (Part.A, Part.B)
        and all(key in other.tensors and torch.equal(other.tensors[key], value) for other in others)
    }
    return {
        key: value
        for key, value in experts.items()
        if {key._replace(part=Part.A), key._replace(part=Part.B)} <= experts.keys()
    }


def _some(experts: dict[Key, Tensor]) -> dict[Key, Tensor]:
    if not experts:
        raise CoterieError("the clients have no expert in common, so there is no model for a newcomer; name a client")
    return experts


def _mean_part(banks: Banks, part: Part) -> dict[Key, Tensor]:
    """The mean over clients of the tensors that are ``part``, by key, over the clients that have it."""
    keys = sorted({key for bank in banks for key in bank.tensors if key.part is part and key.expert == NO_EXPERT})
    return {key: torch.stack([bank.tensors[key] for bank in banks if key in bank.tensors]).mean(0) for key in keys}


def _equal(one: Mapping[K, Tensor], other: Mapping[K, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


_BY_GATE: Mapping[str, Callable[[Banks], Bank]] = {
    "constant": _mean_lora,
    "slot_top_k": _without_own,
    "scaled_dot_product": _shared_alone,
}
