"""The load-balance loss, mean embeddings and rows set aside: against their definitions, and padding left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.nn.attach import attach
from coterie.nn.gates import balance_loss, top_k
from coterie.ops.streams import stream
from coterie.requests import Balance, HoldOut, Observe, Optim
from coterie.types import NO_EXPERT, SHARED, Bank, CoterieError, Key, Part, Target
from workplaces import client_of, largest_difference, make_workplace, plain_bank, train

OPTIM = Optim(learning_rate=0.01, batch_size=4, epochs=1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def routed(workplace: Workplace, dropout: float = 0.0, own_masks: bool = False) -> Bank:
    """Three routed experts of rank 4, and a shared one."""
    options = {"experts": 3, "shared": 4, "gate": "scaled_dot_product", "options": {"k": 2}}
    return replace(plain_bank(workplace, dropout, **options), own_masks=own_masks)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "numbers"), dtype=torch.float64)


# the loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_by_its_definition_with_some_tokens_left_out() -> None:
    p, counted = numbers(7, 4), torch.tensor([1, 1, 0, 1, 0, 1, 1])
    g = top_k(p, None, k=2)
    rows = [i for i in range(7) if counted[i]]
    mean = sum(p[i].softmax(0) for i in rows) / len(rows)
    picks = torch.zeros(4, dtype=torch.float64)
    for i in rows:
        picks[p[i].topk(2).indices] += 1
    wanted = 4 * float((mean * picks / picks.sum()).sum())
    assert float(balance_loss("top_k", p, None, g, counted)) == pytest.approx(wanted, abs=1e-12)
    assert float(balance_loss("top_k", p[rows], None, g[rows], None)) == pytest.approx(wanted, abs=1e-12)


def test_the_loss_is_one_where_every_expert_is_used_and_more_where_few_are() -> None:
    even = torch.eye(4, dtype=torch.float64)
    assert float(balance_loss("top_k", even, None, top_k(even, None, k=1), None)) == pytest.approx(1)
    one = 9 * torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]]
    assert float(balance_loss("top_k", one, None, top_k(one, None, k=1), None)) > 3.9


def test_a_gate_without_scores_has_no_loss() -> None:
    with pytest.raises(ValueError, match=r"'slot_top_k' has no load-balance loss; .* scaled_dot_product"):
        balance_loss("slot_top_k", numbers(2, 3), None, numbers(2, 2), None)


def test_training_pushes_the_loss_down_and_reports_it() -> None:
    workplace = make_workplace()
    client, bank = client_of(workplace), routed(workplace)
    found = []
    for weight in (0.0, 30.0):
        balance, before = Balance(weight), None
        for rnd in range(1, 7):
            done = train(workplace, bank, OPTIM, rnd, client=client, balance=balance)
            bank = replace(bank, tensors={**bank.tensors, **done.tensors})
            before = before or done.balance
        found.append((before, done.balance))
        bank = routed(workplace)
    (_, without), (first, last) = found
    assert 1 <= last < first
    assert last < without
    assert train(workplace, bank, OPTIM, client=client).balance == 0


def test_weight_zero_trains_as_if_no_one_asked() -> None:
    workplace = make_workplace()
    bank = routed(workplace)
    one, other = train(workplace, bank, OPTIM, balance=Balance(0.0)), train(workplace, bank, OPTIM)
    assert largest_difference(one.tensors, other.tensors) < 1e-12
    assert one.loss == pytest.approx(other.loss, abs=1e-12)


def test_the_loss_is_a_mean_over_micro_batches() -> None:
    """With one batch divided in two of equally many tokens, routing and all, the two losses' mean is trained."""
    workplace = make_workplace()
    client, bank = client_of(workplace), routed(workplace)
    done = train(
        workplace, bank, replace_optim(batch_size=2, accumulate=2, steps=1), client=client, balance=Balance(1.0)
    )
    assert done.steps == 1
    modules = len(workplace.base.spec.targets)
    assert modules <= done.balance < 3 * modules


def replace_optim(**changes: Any) -> Optim:
    return Optim(**{**OPTIM.model_dump(), **changes})


def test_gradient_checkpointing_counts_the_loss_once() -> None:
    found = []
    for checkpointing in (False, True):
        workplace = make_workplace()
        if checkpointing:
            workplace.base.model.gradient_checkpointing_enable({"use_reentrant": False})
            workplace.base.model.train()
        found.append(train(workplace, routed(workplace, dropout=0.2), OPTIM, balance=Balance(1.0)))
    assert largest_difference(found[0].tensors, found[1].tensors) < 1e-10
    assert found[0].balance == pytest.approx(found[1].balance, abs=1e-12)


# padding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
def test_what_padding_tokens_hold_changes_nothing_unless_they_count(counted: bool) -> None:
    """A layer alone, with other numbers where the padding is."""
    bank = tiny.bank(
        [Target("0", 12, 10)], 3, gate="scaled_dot_product", options={"k": 2}, shared=4, dtype=torch.float64
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = []
    for fill in (0.0, 7.0):
        module = nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)).requires_grad_(False)
        attached = attach(module, bank)
        attached.now.mask, attached.now.balance, attached.now.embeddings = None if counted else mask, [], {}
        x = numbers(2, 5, 12).masked_fill(mask.unsqueeze(-1) == 0, fill)
        module(x)
        found.append([*attached.now.balance, *(value for _, value in sorted(attached.now.embeddings.items()))])
    assert len(found[0]) == 1 + 4
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    assert all(same) if not counted else not any(same)


@pytest.mark.parametrize("padding", [False, True])
def test_training_counts_padding_only_if_asked(padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training with every batch padded to 30 tokens: another load-balance loss only where padding counts."""
    found = []
    for width in (0, 30):
        workplace = make_workplace()
        collate = workplace.task.collate

        def wider(examples: Any, collate: Any = collate, width: int = width) -> Any:
            batch = collate(examples)
            more = max(0, width - batch.mask.shape[1])
            inputs = {name: nn.functional.pad(value, (0, more)) for name, value in batch.inputs.items()}
            return replace(batch, inputs=inputs)

        workplace.task = replace_collate(workplace.task, wider)
        found.append(train(workplace, routed(workplace), OPTIM, balance=Balance(1.0, padding)))
    apart = largest_difference(found[0].tensors, found[1].tensors)
    assert (apart > 1e-4) if padding else (apart < 1e-6)
    assert (abs(found[0].balance - found[1].balance) > 1e-3) == padding


def replace_collate(task: Any, collate: Any) -> Any:
    made = replace(task)
    object.__setattr__(made, "collate", collate)
    return made


def test_under_autocast_the_loss_stays_in_float32() -> None:
    p = numbers(600, 4).float()
    g = top_k(p, None, k=2)
    with torch.autocast("cpu", torch.bfloat16):
        masked, plain = (balance_loss("top_k", p, None, g, counted) for counted in (torch.ones(600), None))
    assert masked.dtype == plain.dtype == torch.float32
    assert float(masked) == pytest.approx(float(plain), abs=1e-6)


def test_embeddings_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter rows are padded in large batches; with padding counted that shows."""
    seen = {}
    for size in (1, 8):
        workplace = make_workplace(eval_batch_size=size)
        worker = LocalCompute(workplace, client_of(workplace), 1)
        for padding in (False, True):
            request = Observe(routed(workplace), "train", ("embeddings",), padding=padding)
            seen[size, padding] = worker.observe(request).embeddings
    assert largest_difference(seen[1, False], seen[8, False]) < 1e-6
    assert largest_difference(seen[1, True], seen[8, True]) > 1e-3


# embeddings ----------------------------------------------------------------------------------------------------------


def test_embeddings_are_means_of_the_projections_of_a_modules_input() -> None:
    workplace = make_workplace()
    client, bank = client_of(workplace), routed(workplace)
    observed = LocalCompute(workplace, client, 1).observe(Observe(bank, "test", ("usage", "embeddings")))
    module = workplace.base.spec.targets[0].name  # of the first layer: its input does not depend on the bank
    rows = [workplace.task.collate([example]) for example in workplace.examples(client, "test")]
    inputs: list[Tensor] = []
    handle = workplace.base.model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    for batch in rows:
        workplace.base.model(**batch.inputs)
    handle.remove()
    x = torch.cat(inputs)
    assert observed.tokens == len(x)
    for expert, part in ((0, Part.A), (2, Part.A), (NO_EXPERT, Part.ROUTER)):
        wanted = (x @ bank.tensors[Key(module, expert, part)].T).mean(0).float()
        torch.testing.assert_close(observed.embeddings[Key(module, expert, Part.EMBEDDING)], wanted)
    assert not any(key.expert == SHARED for key in observed.embeddings)
    assert observed.usage[module].expert == [SHARED, 0, 1, 2]
    assert observed.usage[module].share[0] == 1


def test_a_module_that_runs_twice_in_a_pass_has_the_means_of_both_runs() -> None:
    """As ALBERT's layers do."""
    workplace = make_workplace()
    worker, request = (
        LocalCompute(workplace, client_of(workplace), 1),
        Observe(routed(workplace), "test", ("usage", "embeddings")),
    )
    once = worker.observe(request)
    query = workplace.base.model.get_submodule(workplace.base.spec.targets[0].name)

    def twice(module: nn.Module, args: Any, output: Tensor) -> None:
        if not getattr(module, "_again", False):
            module._again = True  # type: ignore[assignment]
            module(*args)
            module._again = False  # type: ignore[assignment]

    handle = query.register_forward_hook(twice)
    seen = worker.observe(request)
    handle.remove()
    assert seen.tokens == once.tokens
    assert largest_difference(seen.embeddings, once.embeddings) < 1e-6
    name = workplace.base.spec.targets[0].name
    assert seen.usage[name].weight == pytest.approx(once.usage[name].weight, abs=1e-9)
    assert max(seen.usage[name].share) <= 1


# dropout -------------------------------------------------------------------------------------------------------------


def test_with_own_masks_each_expert_draws_its_own_and_routing_sees_none() -> None:
    """All experts alike and B = 1: with one mask they all add the same, with their own they do not."""
    ones = {Key("0", e, part): torch.ones(1, 12) if part is Part.A else torch.ones(1, 1) for e in range(3)
            for part in (Part.A, Part.B)}  # fmt: skip
    seen = {}
    for own_masks in (False, True):
        module = nn.Sequential(nn.Linear(12, 1, bias=False)).requires_grad_(False)
        module[0].weight.zero_()
        attached = attach(module, Bank(ones, dropout=0.5, own_masks=own_masks))
        attached.now.training = True
        x = torch.ones(200, 12)
        thirds = module(x).flatten() / 3 / 2  # /2: dropout's scale; a whole number of inputs kept, with one mask
        seen[own_masks] = float((thirds - thirds.round()).abs().max())
    assert seen[False] < 1e-4
    assert seen[True] > 0.1


# rows set aside ------------------------------------------------------------------------------------------------------


def test_rows_set_aside_are_the_same_each_round_and_are_not_trained_on() -> None:
    workplace = make_workplace()
    client, hold_out = client_of(workplace), HoldOut(0.25, 200)
    left, aside = workplace.divided(client, "train", hold_out)
    assert (len(left), len(aside)) == (6, 2)
    assert sorted(left + aside, key=str) == sorted(workplace.examples(client, "train"), key=str)
    assert workplace.divided(client, "train", hold_out) == (left, aside)
    other = client_of(workplace, "south")
    assert workplace.divided(other, "train", hold_out)[1] != aside
    done = train(workplace, routed(workplace), OPTIM, client=client, hold_out=hold_out)
    assert done.examples == 6
    assert done.tokens == sum(len(example.ids) for example in left)
    observed = LocalCompute(workplace, client, 3).observe(
        Observe(routed(workplace), "train", ("embeddings",), hold_out)
    )
    assert observed.tokens == sum(len(example.ids) for example in aside)


@pytest.mark.parametrize(("rows", "count"), [(2, 1), (10, 1), (100, 5), (8000, 200)])
def test_how_many_are_set_aside(rows: int, count: int) -> None:
    assert HoldOut(0.05, 200).count(rows) == count


def test_a_client_whose_rows_would_all_be_set_aside_is_told() -> None:
    workplace = make_workplace()
    with pytest.raises(CoterieError, match=r"client north has 1 train row"):
        train(workplace, routed(workplace), OPTIM, client=client_of(workplace, number=1), hold_out=HoldOut(0.05, 200))
