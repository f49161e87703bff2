"""Checks the bank that a site sends at the end: it fits the base, its gate fits its experts, and it can be written."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from types import UnionType

import torch
from torch import Tensor

from coterie.adapters.bundle import bundle_fault
from coterie.engines.checks import is_number, json_fault, shown, tensor_fault
from coterie.nn.gates import Gate, gate_named, routes_by_expert
from coterie.types import FOLDED, NO_EXPERT, SHARED, Bank, BaseSpec, CoterieError, Json, Key, Part, Tensors

# What a gate raises for options and routers that do not suit it; one of an installed package may not check them first.
_MISFITS = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError)
_PLAIN = {str, bool, int, float, type(None)}  # kinds of options that a type can be checked against


def bank_fault(bank: Bank, spec: BaseSpec, labels: Sequence[str] | None) -> str | None:
    """Why a site's ``bank`` cannot be written or attached to the base, or None.

    It fits the base, each A has its B, all values are finite, and the gate takes its options and its router.
    """
    fault = json_fault({"name": bank.gate.name, "all": dict(bank.gate.options), "each": dict(bank.gate.per_module)})
    if fault:
        return f"its gate {fault}"
    try:
        gate = gate_named(bank.gate.name)
    except CoterieError as unknown:
        return str(unknown)
    if not is_number(bank.scaling) or not is_number(bank.dropout, 0, 1) or bank.dropout == 1:
        return "its scaling or its dropout is out of range"
    return _tensors_fault(bank, spec, labels) or _gates_fault(gate, bank) or bundle_fault(bank)


def _tensors_fault(bank: Bank, spec: BaseSpec, labels: Sequence[str] | None) -> str | None:
    shapes = {p.name: p.shape_for(len(labels or ())) for p in spec.head}
    sizes = {t.name: (t.d_in, t.d_out) for t in spec.targets}
    for key, value in bank.tensors.items():
        shape = shapes.get(key.module) if key.part is Part.HEAD else _expected(key, value, sizes.get(key.module), bank)
        if shape is None:
            return f"the base has no {shown(str(key))}"
        if fault := tensor_fault(key, value, shape):
            return fault
    for part, other in ((Part.A, Part.B), (Part.B, Part.A)):
        for key in (key for key in bank.tensors if key.part is part):
            pair = bank.tensors.get(key._replace(part=other))
            if pair is None or pair.shape[int(other is Part.B)] != bank.tensors[key].shape[int(part is Part.B)]:
                return f"{key} has no {other.value} of its rank"
    return None


def _expected(key: Key, value: Tensor, sizes: tuple[int, int] | None, bank: Bank) -> tuple[int, ...] | None:
    """The shape that the tensor of an expert or a router should have: one side is free. None: there is no such key."""
    number = key.expert == NO_EXPERT if key.part is Part.ROUTER else key.expert >= FOLDED and key.expert != NO_EXPERT
    if sizes is None or not number or key.part is Part.EMBEDDING or value.ndim != 2 or not value.numel():
        return None
    if key.part is Part.B:
        return sizes[1], value.shape[1]
    if key.part is Part.ROUTER and routes_by_expert(bank.gate.name):
        return len(_experts(bank.tensors, key.module, routed=True)), value.shape[1]
    return value.shape[0], sizes[0]


def _experts(tensors: Tensors, module: str, routed: bool = False) -> list[int]:
    """The numbers of a module's experts, in the bank's order; with ``routed`` those that the gate weighs."""
    numbers = sorted(key.expert for key in tensors if key.module == module and key.part is Part.A)
    return [number for number in numbers if not (routed and number == SHARED)]


def _gates_fault(gate: Gate, bank: Bank) -> str | None:
    """Why the gate of a module does not fit the module's experts, or None."""
    for module in sorted({key.module for key in bank.tensors if key.part in (Part.A, Part.ROUTER)}):
        experts = _experts(bank.tensors, module, routed=True)
        router = bank.tensors.get(Key(module, NO_EXPERT, Part.ROUTER))
        where = f"{module}, gate {bank.gate.name!r}"
        if router is not None and not _experts(bank.tensors, module):
            return f"{where}: a router without an expert"
        if FOLDED in experts and bank.gate.name != "constant":
            return f"{where}: a bank with a folded expert has the gate 'constant'"
        options = bank.gate.options_for(module)
        ranks = [len(bank.tensors[Key(module, expert, Part.A)]) for expert in experts]
        if experts and (fault := _option_fault(gate, options) or _trial_fault(gate, options, router, ranks)):
            return f"{where}: {fault}"
    return None


def _option_fault(gate: Gate, options: Mapping[str, Json]) -> str | None:
    try:
        hints = typing.get_type_hints(gate)
    except NameError:  # a package may import its types for type checkers alone
        hints = {}
    for name, value in options.items():
        hint = hints.get(name)
        kinds = set(typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,))
        number = type(value) is int and float in kinds
        if kinds <= _PLAIN and hint is not None and not (type(value) in kinds or number):
            return f"its option {shown(name)} is {shown(value)}, which is of the wrong type"
    return None


def _trial_fault(gate: Gate, options: Mapping[str, Json], router: Tensor | None, ranks: Sequence[int]) -> str | None:
    """Why the gate does not work for experts of these ``ranks``: tried on one token of zeros, as ``attach`` does."""
    by_expert = routes_by_expert(gate.__name__)
    p = router if by_expert or router is None else torch.zeros(1, len(router))
    z = torch.zeros(1, len(ranks), ranks[0]) if len(set(ranks)) == 1 else None
    try:
        g = gate(p, z, **options)
    except _MISFITS as fault:
        return str(fault)
    if g is not None and tuple(g.shape) != (1, len(ranks)):
        return f"its weights have the shape {list(g.shape)}, not {[1, len(ranks)]}"
    return "its weights are not finite" if g is not None and not bool(torch.isfinite(g).all()) else None
