"""``coterie.load`` of a run without a client: what its clients have in common, for someone new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bundles
import coterie
import tiny
from coterie.adapters.bundle import BUNDLE_FILE, read_bundle, write_bundle
from coterie.adapters.write import write_adapter
from coterie.artifacts.newcomer import newcomer_bank
from coterie.methods.parts import lora_of
from coterie.nn.attach import attached
from coterie.types import NO_EXPERT, SHARED, Bank, CoterieError, GateSpec, Key, Part

MADE = tiny.model("bert")
OVER = tiny.targets(MADE)


def logits(bank: Bank) -> torch.Tensor:
    with torch.no_grad(), attached(MADE, bank):
        out: torch.Tensor = MADE(**tiny.batch()).logits
    return out


def with_routers(bank: Bank, seed: int) -> Bank:
    drawn = tiny.bank(OVER, 3, gate=bank.gate.name, options=bank.gate.options, seed=seed).tensors
    routers = {key: value for key, value in drawn.items() if key.part is Part.ROUTER}
    return replace(bank, tensors={**bank.tensors, **routers})


def test_one_lora_for_all_is_the_newcomers() -> None:
    bank = tiny.bank(OVER)
    assert torch.equal(logits(newcomer_bank([bank, bank])), logits(bank))


def test_different_loras_are_averaged_by_their_products() -> None:
    banks = [tiny.bank(OVER, rank=2, seed=1), tiny.bank(OVER, rank=3, seed=2, scaling=0.5)]
    mean = newcomer_bank(banks)
    for target in OVER:
        expected = sum(
            b.scaling / 2 * b.tensors[Key(target.name, 0, Part.B)] @ b.tensors[Key(target.name, 0, Part.A)]
            for b in banks
        )
        a, b = (mean.tensors[Key(target.name, 0, part)] for part in (Part.A, Part.B))
        assert isinstance(expected, torch.Tensor)
        assert torch.allclose(mean.scaling * b @ a, expected, atol=1e-5)


def test_fedleases_newcomer_has_no_expert_of_its_own() -> None:
    bank = tiny.bank(OVER, 3, gate="slot_top_k", options={"own": 0})
    banks = [replace(with_routers(bank, i), gate=GateSpec("slot_top_k", {"own": i})) for i in range(3)]
    made = newcomer_bank(banks)
    assert made.gate == GateSpec("softmax")
    key = Key(OVER[0].name, NO_EXPERT, Part.ROUTER)
    mean = sum(b.tensors[key][:3] for b in banks) / 3
    assert isinstance(mean, torch.Tensor)
    assert torch.allclose(made.tensors[key], mean)
    assert made.tensors.keys() == bank.tensors.keys()
    logits(made)


def owned_by(bank: Bank, own: int, changed: dict[Key, torch.Tensor]) -> Bank:
    return replace(bank, tensors={**bank.tensors, **changed}, gate=GateSpec("slot_top_k", {"own": own}))


def test_fedleases_newcomer_has_no_older_copies() -> None:
    bank = tiny.bank(OVER, 3, gate="slot_top_k", options={"own": 0})
    copies = [{key: v + 1 for key, v in bank.tensors.items() if key.expert in numbers} for numbers in ((1, 2), (0,))]
    made = newcomer_bank([owned_by(bank, 0, copies[0]), owned_by(bank, 1, copies[1]), owned_by(bank, 2, copies[1])])
    experts = {key: value for key, value in made.tensors.items() if key.part in (Part.A, Part.B)}
    assert {key.expert for key in experts} == {0, 1, 2}
    assert all(torch.equal(value, bank.tensors[key]) for key, value in experts.items())


def test_fedleases_newcomer_weighs_each_expert_by_its_own_slot() -> None:
    """Expert 0 is withheld from those that have another."""
    bank = tiny.bank(OVER, 3, gate="slot_top_k", options={"own": 0})
    starts = {key: torch.zeros_like(v) for key, v in bank.tensors.items() if key.expert == 0 and key.part is Part.B}
    made = newcomer_bank([bank, owned_by(bank, 1, starts), owned_by(bank, 2, starts)])
    for target in OVER:
        assert {key.expert for key in made.tensors if key.module == target.name and key.part is Part.A} == {1, 2}
        router = Key(target.name, NO_EXPERT, Part.ROUTER)
        assert torch.allclose(made.tensors[router], bank.tensors[router][1:3], rtol=1e-6, atol=0)  # a mean of three
    logits(made)


def test_fedamoles_newcomer_has_the_shared_expert() -> None:
    banks = [tiny.bank(OVER, n, gate="scaled_dot_product", options={"k": 1}, shared=2) for n in (1, 2)]
    made = newcomer_bank(banks)
    assert {key.expert for key in made.tensors} == {0}
    for target in OVER:
        for part in (Part.A, Part.B):
            expected = banks[0].tensors[Key(target.name, SHARED, part)]
            assert torch.equal(made.tensors[Key(target.name, 0, part)], expected)


def test_a_pools_newcomer_has_the_pool_with_the_routers_mean() -> None:
    bank = tiny.bank(OVER, 4, rank=1, gate="top_k", options={"k": 2})
    assert torch.equal(logits(newcomer_bank([bank, bank])), logits(bank))


def test_a_mixing_router_keeps_what_it_mixes_of_the_experts_that_all_have() -> None:
    """The second client has another value of one expert more: of C, the column of that expert goes, too."""
    first, drawn = (tiny.bank(OVER, 3, rank=1, gate="mixing", seed=seed).tensors for seed in (0, 5))
    second = {key: drawn[key] if key.expert in (1, NO_EXPERT) else value for key, value in first.items()}
    made = newcomer_bank([Bank(tensors, GateSpec("mixing")) for tensors in (first, second)])
    for target in OVER:
        key = Key(target.name, NO_EXPERT, Part.ROUTER)
        expected = ((first[key] + drawn[key]) / 2)[[0, 2]][:, [0, 1, 3]]
        assert torch.allclose(made.tensors[key], expected)
    logits(made)


def test_a_pools_newcomer_activates_as_many_experts_as_most_clients() -> None:
    weak, bank = (tiny.bank(OVER, 4, rank=1, gate="top_k", options={"k": k}) for k in (1, 3))
    assert newcomer_bank([weak, bank, bank]).gate == bank.gate


@pytest.mark.parametrize("gate", [GateSpec("top_k", {"k": 3}), GateSpec("signed", {"k": 3})])
def test_a_router_keeps_the_rows_of_the_experts_that_all_have(gate: GateSpec) -> None:
    """The second client has one expert less, and another value of one more: two of the four are common."""
    first = tiny.bank(OVER, 4, gate=gate.name, options=gate.options)
    drawn = tiny.bank(OVER, 4, gate=gate.name, options=gate.options, seed=5).tensors
    routers = {key: value[[0, 2, 3]] for key, value in drawn.items() if key.part is Part.ROUTER}
    fewer = {key: value + (key.expert == 2) for key, value in first.tensors.items() if key.expert not in (1, NO_EXPERT)}
    made = newcomer_bank([first, replace(first, tensors={**fewer, **routers})])
    assert made.gate == gate
    for target in OVER:
        assert {key.expert for key in made.tensors if key.module == target.name and key.part is Part.A} == {0, 3}
        key = Key(target.name, NO_EXPERT, Part.ROUTER)
        expected = (first.tensors[key][[0, 3]] + drawn[key][[0, 3]]) / 2
        assert torch.allclose(made.tensors[key], expected)
    logits(made)


@pytest.mark.parametrize("gate", ["slot_top_k", "softmax"])
def test_clients_without_a_router_are_left_out_where_others_have_one(gate: str) -> None:
    """As FedLEASE's that no round has drawn, whose LoRA is at its start, under the number of another's expert."""
    options = {"own": 0} if gate == "slot_top_k" else {}
    never, bank = tiny.bank(OVER, seed=7, zero_b=True), tiny.bank(OVER, 3, gate=gate, options=options)
    alone, made = newcomer_bank([bank, bank]), newcomer_bank([never, bank, bank])
    assert made.gate == alone.gate == GateSpec("softmax")
    assert made.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(value, alone.tensors[key]) for key, value in made.tensors.items())


def test_feddpas_newcomer_has_the_global_expert_if_only_one_client_took_part() -> None:
    drawn = tiny.bank(OVER, 2, gate="similarity", options={"scale": 0.5}, slots=1)
    never = replace(drawn, tensors=lora_of(drawn.tensors, 0), gate=GateSpec())
    made = newcomer_bank([drawn, never])
    assert made.gate == GateSpec()
    assert made.tensors.keys() == never.tensors.keys()
    assert all(torch.equal(value, never.tensors[key]) for key, value in made.tensors.items())


COPIES = {0: (1,), 1: (0, 2), 2: (0, 1)}  # by client, whose own expert has its number: those it holds an older copy of


@pytest.mark.parametrize("gate", [GateSpec("top_k", {"k": 2}), GateSpec("softmax")])
def test_of_older_copies_the_newcomer_has_the_version_of_the_server(gate: GateSpec, tmp_path: Path) -> None:
    """FedLEASE's with ``download = "used"`` and another routing, whose gates do not say which expert is a client's."""
    run = bundles.finished(tmp_path, gate=gate.name, options=gate.options)
    bank, about = read_bundle(run / "clients" / "north")
    for client, older in COPIES.items():
        copies = {key: value + 1 for key, value in bank.tensors.items() if key.expert in older}
        held = replace(bank, tensors={**bank.tensors, **copies})
        write_bundle(run / "clients" / f"c{client}", held, replace(about, client=f"c{client}"))
    for client in ("north", "south"):
        (run / "clients" / client / BUNDLE_FILE).unlink()
    with pytest.raises(CoterieError, match=r"hold different versions of expert 0, and .*experts does not have one of"):
        coterie.load(run)
    for number in range(3):
        expert = lora_of(bank.tensors, number, new=0)
        write_adapter(run / "experts" / f"expert-{number}", expert, rank=2, alpha=2 * bank.scaling, about=about)
    new = coterie.load(run).bank
    assert new.gate == gate
    experts, others = lora_of(bank.tensors), lora_of(new.tensors)
    assert experts.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in experts.items())
    routers = {key: value for key, value in new.tensors.items() if key.part is Part.ROUTER}
    assert {len(value) for value in routers.values()} == {3}


def test_a_withheld_expert_is_left_out_whatever_the_gate() -> None:
    bank = tiny.bank(OVER, 3, gate="softmax")
    starts = {key: torch.zeros_like(v) for key, v in bank.tensors.items() if key.expert == 0 and key.part is Part.B}
    scaled = {
        (k.module, k.part): v * (bank.scaling if k.part is Part.B else 1) for k, v in lora_of(bank.tensors, 0).items()
    }
    made = newcomer_bank([bank, replace(bank, tensors={**bank.tensors, **starts})], {0: scaled})
    assert {key.expert for key in made.tensors if key.part is Part.A} == {1, 2}


@pytest.mark.parametrize(
    ("banks", "why"),
    [
        (
            [tiny.bank(OVER, 2, gate=gate) for gate in ("constant", "softmax", "top_k")],
            r"the clients' gates differ \(softmax, top_k\)",
        ),
        ([tiny.bank(OVER, 2, gate="softmax", seed=i) for i in (0, 1)], "have no expert in common"),
        (
            [tiny.bank(OVER, 2, gate="slot_top_k", options={"own": 0}, seed=i) for i in (0, 1)],
            r"hold different versions of expert 0 in .*; name a client",
        ),
        ([tiny.bank(OVER, 2, gate="scaled_dot_product", options={"k": 1})], "have no shared expert"),
    ],
)
def test_clients_with_nothing_in_common_are_an_error(banks: Sequence[Bank], why: str) -> None:
    with pytest.raises(CoterieError, match=why):
        newcomer_bank(banks)


def same_experts(folder: Path, **of_south: Any) -> Path:
    """A run whose clients differ only in what is said of south."""
    run = bundles.finished(folder)
    bank, about = read_bundle(run / "clients" / "north")
    write_bundle(run / "clients" / "south", bank, replace(about, client="south", **of_south))
    return run


def test_a_newcomer_with_everyones_labels_has_their_head(tmp_path: Path) -> None:
    run = same_experts(tmp_path)
    new = coterie.load(run)
    assert (new.client, new.labels) == ("", bundles.LABELS)
    bank, _ = read_bundle(run / "clients" / "north")
    heads = {key: value for key, value in bank.tensors.items() if key.part is Part.HEAD}
    assert heads
    assert all(torch.equal(new.bank.tensors[key], value) for key, value in heads.items())
    (answer,) = new.predict([{"text": "x"}])
    assert answer.label in bundles.LABELS  # type: ignore[union-attr]


def test_a_newcomer_with_other_labels_has_a_fresh_head(tmp_path: Path) -> None:
    run = same_experts(tmp_path, labels=("a", "b", "c"))
    with pytest.raises(CoterieError, match=r"have different labels: name one of them .*give the labels"):
        coterie.load(run)
    one, other = (coterie.load(run, labels=["yes", "no", "perhaps", "never"]) for _ in range(2))
    assert one.labels == ("yes", "no", "perhaps", "never")
    assert one.predict([{"text": "x"}]) == other.predict([{"text": "x"}])
    assert len(one.predict([{"text": "x"}])[0].columns()["probabilities"]) == 4  # type: ignore[arg-type]
    with pytest.raises(CoterieError, match="labels are two or more different names"):
        coterie.load(run, labels=["yes", "yes"])
    with pytest.raises(CoterieError, match="labels are for someone new"):
        coterie.load(run, "north", labels=["yes", "no"])


def test_a_newcomer_writes_text(tmp_path: Path) -> None:
    run = bundles.finished(tmp_path, "generation")
    bank, about = read_bundle(run / "clients" / "north")
    write_bundle(run / "clients" / "south", bank, replace(about, client="south"))
    assert len(coterie.load(run).predict([{"prompt": "x"}])) == 1
    with pytest.raises(CoterieError, match=r"labels are for classification, and .* is of generation; leave them out"):
        coterie.load(run, labels=["yes", "no"])
