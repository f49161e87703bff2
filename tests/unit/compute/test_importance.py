"""Importance of modules from their gates: against finite differences, and counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tiny
from coterie.compute.importance import gate_importance
from coterie.data.examples import Batch
from coterie.nn import gates
from coterie.nn.attach import attached
from coterie.nn.bank import BankLayer
from coterie.types import Bank, Key, Part

torch.set_num_threads(1)
MODEL = tiny.model("bert").double()
OVER = tiny.targets(MODEL)
INPUTS = tiny.batch()
BATCH = Batch(INPUTS, torch.tensor([0, 2, 1]), 3)


def loss(batch: Batch) -> Tensor:
    return functional.cross_entropy(MODEL(**batch.inputs).logits, batch.labels, reduction="sum")


def bank(**settings: Any) -> Bank:
    made = tiny.bank(OVER, **{"experts": 4, "rank": 1, "gate": "top_k", "options": {"k": 2}, **settings})
    return Bank({k: v.double() for k, v in made.tensors.items()}, made.gate, made.scaling)


def measured(over: Bank, *what: str) -> dict[str, dict[str, float]]:
    return gate_importance(MODEL, over, [BATCH], loss, what)


@pytest.mark.parametrize("shared", [0, 2])
def test_first_order_is_what_finite_differences_say(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    over = bank(shared=shared)
    found = measured(over, "first_order")["first_order"]
    assert found.keys() == {t.name for t in OVER}
    module, tokens = OVER[1].name, int(BATCH.mask.sum())
    weights: list[Tensor] = []
    nudge: list[tuple[int, int, float]] = []
    original = BankLayer.weights

    def nudged(self: BankLayer, *args: Any) -> Tensor | None:
        g = original(self, *args)
        if g is not None and self.module == module:
            weights.append(g)
            g = g.clone()
            for token, expert, by in nudge:
                g[token, expert] += by
        return g

    monkeypatch.setattr(BankLayer, "weights", nudged)
    with attached(MODEL, over), torch.no_grad():
        loss(BATCH)
        g = weights[-1]
        total = 0.0
        first = 1 if shared else 0
        for token in BATCH.mask.reshape(-1).nonzero().reshape(-1).tolist():
            for expert in range(first, g.shape[1]):
                if not g[token, expert]:
                    continue
                values = []
                for by in (1e-5, -1e-5):
                    nudge[:] = [(token, expert, by)]
                    values.append(float(loss(BATCH)))
                total += abs(float(g[token, expert]) * (values[0] - values[1]) / 2e-5)
    assert found[module] == pytest.approx(total / tokens, rel=1e-4)


def test_gate_mass_counted_by_hand() -> None:
    over = bank()
    found = measured(over, "gate_mass", "first_order")
    module = OVER[0].name
    seen: list[Tensor] = []
    handle = MODEL.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        MODEL(**INPUTS)
    handle.remove()
    router = next(v for k, v in over.tensors.items() if k.module == module and k.part is Part.ROUTER)
    g = gates.top_k(seen[0].reshape(-1, router.shape[1]) @ router.T, None, k=2)
    norms = torch.stack(
        [over.tensors[Key(module, e, Part.A)].norm() * over.tensors[Key(module, e, Part.B)].norm() for e in range(4)]
    )
    real = INPUTS["attention_mask"].reshape(-1, 1)
    expected = float((g * norms * over.scaling * real).sum() / real.sum())
    # the module is in the first layer: what comes into it does not depend on the bank
    assert module.startswith("bert.encoder.layer.0")
    assert found["gate_mass"][module] == pytest.approx(expected)
    assert found["first_order"] == measured(over, "first_order")["first_order"]


def test_padding_batches_and_the_number_of_rows_do_not_count() -> None:
    over, rows = bank(), [INPUTS["attention_mask"][i].sum() for i in range(3)]
    apart = [
        Batch({k: v[i : i + 1, : rows[i]] for k, v in INPUTS.items()}, BATCH.labels[i : i + 1], 1) for i in range(3)
    ]
    alone = gate_importance(MODEL, over, apart, loss, ("first_order", "gate_mass"))
    together = measured(over, "first_order", "gate_mass")
    for statistic, values in together.items():
        assert alone[statistic] == pytest.approx(values)


def test_a_silent_module_is_of_no_importance_and_a_bank_without_gates_has_none() -> None:
    over = bank()
    silent = OVER[2].name
    tensors = {k: v * 0 if k.module == silent and k.part is Part.B else v for k, v in over.tensors.items()}
    found = measured(Bank(tensors, over.gate, over.scaling), "first_order", "gate_mass")
    assert found["first_order"][silent] == found["gate_mass"][silent] == 0
    assert all(v > 0 for m, v in found["first_order"].items() if m != silent)
    assert measured(tiny_plain(), "first_order", "gate_mass") == {"first_order": {}, "gate_mass": {}}
    assert not any(p.requires_grad for p in MODEL.parameters())


def tiny_plain() -> Bank:
    made = tiny.bank(OVER)
    return Bank({k: v.double() for k, v in made.tensors.items()})
