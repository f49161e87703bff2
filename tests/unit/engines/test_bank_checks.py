"""A site's bank is taken if it can be written and attached, and only then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from coterie.adapters.bundle import bundle_fault, read_bundle, write_bundle
from coterie.engines.bank_checks import bank_fault
from coterie.types import (
    FOLDED,
    NO_EXPERT,
    SHARED,
    Bank,
    BaseSpec,
    CoterieError,
    GateSpec,
    HeadParameter,
    Key,
    Part,
    Target,
)

D_IN, D_OUT, RANK = 8, 6, 2
SPEC = BaseSpec((Target("q", D_IN, D_OUT), Target("v", D_IN, D_OUT)), (HeadParameter("h.weight", (-1, 8), "normal"),))
ROUTER = Key("q", NO_EXPERT, Part.ROUTER)


def experts(*numbers: int, rank: int = RANK, module: str = "q") -> dict[Key, Tensor]:
    pairs = {}
    for number in numbers:
        pairs[Key(module, number, Part.A)] = torch.ones(rank, D_IN)
        pairs[Key(module, number, Part.B)] = torch.ones(D_OUT, rank)
    return pairs


def bank(gate: GateSpec, router: tuple[int, ...] | None, *numbers: int, more: dict[Key, Tensor] | None = None) -> Bank:
    tensors = experts(*(numbers or (0, 1, 2)))
    return Bank(tensors | ({} if router is None else {ROUTER: torch.ones(router)}) | (more or {}), gate)


def signed(options: Mapping[str, object] | None = None, **each: Mapping[str, object]) -> GateSpec:
    return GateSpec("signed", options or {}, each)


GOOD = {
    "signed": bank(signed(), (3, 1)),
    "signed, with k": bank(signed(q={"k": 2}), (3, 1)),
    "signed, a shared expert beside": bank(signed(), (2, 1), SHARED, 0, 1),
    "signed, the shared expert alone": bank(signed(), None, SHARED),
    "response": bank(GateSpec("response"), (3, 6)),
    "mixing": bank(GateSpec("mixing"), (2, 3), 0, 1, more=experts(0, 1, rank=1)),
    "mixing, the shared expert alone": bank(GateSpec("mixing"), None, SHARED),
    "top-k": bank(GateSpec("top_k", {"k": 2, "scale": "active"}), (3, D_IN)),
    "top-k, an integer for a number": bank(GateSpec("top_k", {"k": 2, "scale": 2}), (3, D_IN)),
    "slots": bank(GateSpec("slot_top_k", {"own": 1}), (5, D_IN)),
    "scaled dot product": bank(GateSpec("scaled_dot_product", {"k": 1}), (RANK, D_IN), SHARED, 0, 1),
    "similarity": bank(GateSpec("similarity", {"scale": 0.5}), (1, D_IN), 0, 1),
    "folded": bank(GateSpec(), None, FOLDED, 0),
    "ranks that differ": bank(GateSpec("softmax"), (3, D_IN), 0, 1, more=experts(2, rank=4)),
    "empty": Bank({}),
}

BAD = {
    "an unknown gate": (bank(GateSpec("nonsense"), None), "unknown gate 'nonsense'"),
    "no router": (bank(signed(), None), "q, gate 'signed': it needs a router"),
    "no router on one module": (
        bank(signed(), (3, 1), more=experts(0, module="v")),
        "v, gate 'signed': it needs a router",
    ),
    "no router for rows": (bank(GateSpec("softmax"), None), "q, gate 'softmax': it needs a router"),
    "too few rows": (bank(signed(), (2, 1)), "q:-:router has the shape [2, 1], not [3, 1]"),
    "a row for the shared expert": (bank(signed(), (3, 1), SHARED, 0, 1), "has the shape [3, 1], not [2, 1]"),
    "too many numbers": (bank(signed(), (3, 2)), "a router of 2 numbers for each expert; it must have 1"),
    "mixing of more ranks": (bank(GateSpec("mixing"), (3, 4)), "q, gate 'mixing': it can only mix experts of rank 1"),
    "mixing with too few columns": (
        bank(GateSpec("mixing"), (2, 2), 0, 1, more=experts(0, 1, rank=1)),
        "a router of 2 numbers for each of 2 experts; it must have 3",
    ),
    "an odd number of numbers": (bank(GateSpec("response"), (3, 3)), "a router of 3 numbers for each expert"),
    "a table for a gate by x": (bank(GateSpec("softmax"), (3, 1)), "has the shape [3, 1], not [3, 8]"),
    "too many slots": (bank(GateSpec("softmax"), (4, D_IN)), "its weights have the shape [1, 4], not [1, 3]"),
    "an unknown option": (bank(signed({"foo": 1}), (3, 1)), "unexpected keyword argument 'foo'"),
    "an option of no gate": (bank(GateSpec("constant", {"k": 1}), None), "unexpected keyword argument 'k'"),
    "an option that lacks": (bank(GateSpec("top_k"), (3, D_IN)), "missing 1 required keyword-only argument: 'k'"),
    "a text": (bank(signed(q={"k": "x"}), (3, 1)), "its option 'k' is 'x', which is of the wrong type"),
    "a fraction": (bank(GateSpec("top_k", {"k": 1.5}), (3, D_IN)), "its option 'k' is 1.5"),
    "a truth value": (bank(signed({"k": True}), (3, 1)), "its option 'k' is true"),
    "a list": (bank(signed({"k": [1]}), (3, 1)), "its option 'k' is a list"),
    "a negative k": (bank(signed({"k": -1}), (3, 1)), "k is -1; it must be at least 0"),
    "infinity": (bank(GateSpec("top_k", {"k": 1, "scale": float("inf")}), (3, D_IN)), "its weights are not finite"),
    "an expert that is none": (bank(GateSpec(), None, NO_EXPERT), "the base has no 'q:-:"),
    "an expert's own router": (
        bank(GateSpec("softmax"), (3, D_IN), more={Key("q", 1, Part.ROUTER): torch.ones(3, D_IN)}),
        "the base has no 'q:1:router'",
    ),
    "a router without an expert": (
        bank(GateSpec("softmax"), (3, D_IN), more={Key("v", NO_EXPERT, Part.ROUTER): torch.ones(3, D_IN)}),
        "v, gate 'softmax': a router without an expert",
    ),
    "a folded expert": (bank(signed(), (2, 1), FOLDED, 0), "a bank with a folded expert has the gate 'constant'"),
    "dropout of all": (Bank(experts(0), dropout=1.0), "its dropout is out of range"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_bank_that_fits_is_taken_and_written(name: str, tmp_path: Path) -> None:
    given = GOOD[name]
    assert bank_fault(given, SPEC, ()) is None
    write_bundle(tmp_path, given, tiny.about())
    assert read_bundle(tmp_path)[0].gate == given.gate


@pytest.mark.parametrize("name", BAD)
def test_a_bank_that_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    given, reason = BAD[name]
    found = bank_fault(given, SPEC, ())
    assert found is not None
    assert reason in found


def test_what_cannot_be_written_as_an_adapter_is_an_error_with_the_reason(tmp_path: Path) -> None:
    for given, reason in (BAD["no router"], BAD["an unknown option"], BAD["too many numbers"]):
        found = bundle_fault(given)
        assert found is not None
        assert reason in found
        with pytest.raises(CoterieError, match="q, gate 'signed'"):
            write_bundle(tmp_path, given, tiny.about())
