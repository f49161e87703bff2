"""The last layer of an encoder, computed for the first token alone: when, and that nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.compute.batched import observe_together, score_together, train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.nn.attach import attached
from coterie.nn.first_token import FirstToken, first_token
from coterie.requests import Observe, Optim, Score, Train
from coterie.types import Bank
from workplaces import LABELS, client_of, largest_difference, make_workplace, plain_bank

OPTIM = Optim(batch_size=4, steps=3)
CUTS = {
    "bert": FirstToken("bert.encoder.layer.1.attention.output", "bert.encoder.layer.1."),
    "roberta": FirstToken("roberta.encoder.layer.1.attention.output", "roberta.encoder.layer.1."),
}


def tokens_at(model: nn.Module, name: str) -> list[int]:
    """The tokens of every pass that a module of the model sees from now on."""
    seen: list[int] = []
    model.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    return seen


def whole(workplace: Workplace) -> Workplace:
    return replace(workplace, base=replace(workplace.base, first_token=None))


def routed(workplace: Workplace, targets: Sequence[str] = ()) -> Bank:
    """Three experts with a router over ``targets`` or the default ones, and a head."""
    model = workplace.base.model
    over = tiny.describe(model, tuple(targets)).targets
    made = tiny.bank(over, 3, gate="slot_top_k", options={"own": 1}, dropout=0.1, dtype=torch.float64)
    head = {key: value.double() for key, value in tiny.head(model, LABELS).items()}
    return replace(made, tensors={**made.tensors, **head})


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoders_that_read_the_first_token_are_cut(arch: str, dtype: torch.dtype) -> None:
    model = tiny.model(arch).to(dtype)
    cut = first_token(model)
    assert cut == CUTS.get(arch)
    if cut:
        seen, inputs = tokens_at(model, f"{cut.layer}intermediate.dense"), tiny.batch(5, 9)
        before = model(**inputs).logits
        with cut.only(model):
            cut_logits = model(**inputs).logits
        assert seen == [9, 1]
        exactly = 5e-6 if dtype == torch.float32 else 1e-12  # rounding aside the logits are the same
        torch.testing.assert_close(cut_logits, before, rtol=exactly, atol=exactly)
        assert torch.equal(model(**inputs).logits, before)
        assert seen == [9, 1, 9]


def test_a_head_that_reads_all_tokens_is_left_alone() -> None:
    class Mean(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(dim=1)

    model = tiny.model("bert")
    model.bert.pooler = Mean()
    assert first_token(model) is None


def test_a_head_that_reads_the_second_token_is_left_alone() -> None:
    class Second(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden[:, 1]

    model = tiny.model("bert")
    model.bert.pooler = Second()
    assert first_token(model) is None


def test_targets_behind_the_cut_keep_all_tokens() -> None:
    cut = CUTS["bert"]
    assert cut.keeps_all_tokens(["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"])
    assert cut.keeps_all_tokens(["bert.encoder.layer.10.output.dense"])
    for name in ("attention.output.dense", "intermediate.dense", "output.dense"):
        assert not cut.keeps_all_tokens(["bert.encoder.layer.0.attention.self.query", f"bert.encoder.layer.1.{name}"])


@pytest.mark.parametrize(("targets", "longer"), [((), False), (("query", "intermediate.dense"), True)])
def test_what_the_targets_see_decides(targets: Sequence[str], longer: bool) -> None:
    workplace = make_workplace("bert")
    client, bank = client_of(workplace), routed(workplace, targets)
    seen = tokens_at(workplace.base.model, "bert.encoder.layer.1.output.dense")
    use = LocalCompute(workplace, client, 1).observe(Observe(bank, "test"))
    assert bool(set(seen) - {1}) is longer
    assert use == LocalCompute(whole(workplace), client, 1).observe(Observe(bank, "test"))


@pytest.mark.parametrize("arch", tiny.ENCODERS)
def test_training_scores_and_use_are_the_same(arch: str) -> None:
    workplace = make_workplace(arch)
    bank, client = routed(workplace), client_of(workplace)
    seen = tokens_at(workplace.base.model, f"{CUTS[arch].layer}intermediate.dense")
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    cut, full = (LocalCompute(place, client, 1) for place in (workplace, whole(workplace)))
    mine, theirs = cut.train(request), full.train(request)
    assert seen[:3] == [1] * 3
    assert min(seen[3:]) > 1
    assert largest_difference(mine.tensors, theirs.tensors) < 1e-9
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-12)
    assert largest_difference(mine.tensors, {key: bank.tensors[key] for key in mine.tensors}) > 1e-6
    (one,), (other,) = (each.score(Score([bank], "test", usage=True)) for each in (cut, full))
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert one.observed == other.observed


@pytest.mark.parametrize("arch", tiny.ENCODERS)
def test_the_same_for_many_clients_in_a_pass(arch: str) -> None:
    workplace = make_workplace(arch)
    bank = routed(workplace)
    clients = [client_of(workplace, "north", 8), client_of(workplace, "south", 5)]
    seen = tokens_at(workplace.base.model, f"{CUTS[arch].layer}intermediate.dense")
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    both: list[list[LocalCompute]] = [
        [LocalCompute(place, client, 1) for client in clients] for place in (workplace, whole(workplace))
    ]
    cut, full = (train_together([(one, request) for one in many]) for many in both)
    for mine, theirs in zip(cut, full, strict=True):
        assert not isinstance(mine, Exception)
        assert not isinstance(theirs, Exception)
        assert largest_difference(mine.tensors, theirs.tensors) < 1e-9
    scored, whole_scored = (score_together([(one, Score([bank], "test")) for one in many]) for many in both)
    for few, all_tokens in zip(scored, whole_scored, strict=True):
        assert not isinstance(few, Exception)
        assert not isinstance(all_tokens, Exception)
        assert few[0].loss == pytest.approx(all_tokens[0].loss, rel=1e-12)
    used, whole_used = (observe_together([(one, Observe(bank, "test")) for one in many]) for many in both)
    assert used == whole_used
    assert 1 in seen
    assert max(seen) > 1


def test_gradient_checkpointing_cuts_again() -> None:
    workplace = make_workplace("bert")
    bank, client = routed(workplace), client_of(workplace)
    request = Train(bank, frozenset(bank.tensors), OPTIM)
    plain = LocalCompute(workplace, client, 1).train(request)
    workplace.base.model.gradient_checkpointing_enable({"use_reentrant": False})
    workplace.base.model.train()
    seen = tokens_at(workplace.base.model, "bert.encoder.layer.1.output.dense")
    assert largest_difference(plain.tensors, LocalCompute(workplace, client, 1).train(request).tensors) < 1e-12
    assert seen == [1] * 6


def test_a_model_of_ones_own_is_never_cut() -> None:
    workplace = make_workplace("bert", torch.float32)
    seen = tokens_at(workplace.base.model, "bert.encoder.layer.1.output.dense")
    with attached(workplace.base.model, plain_bank(workplace)):
        workplace.base.model(**tiny.batch(2, 6))
    assert seen == [6]
