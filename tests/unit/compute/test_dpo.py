"""DPO against its formula, computed plainly in float64; what it compares with is computed once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import workplaces
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.dpo import Dpo, Reference
from coterie.data.examples import Example
from coterie.data.rows import ClientData, PreferenceRow, PromptRow
from coterie.data.tasks import Generation
from coterie.nn.attach import attached
from coterie.requests import Observe, Optim, Score, Train
from coterie.types import Bank, ClientInfo

BETA = 0.7
ROWS = tuple(
    PreferenceRow(PromptRow(text, " " + text[::-1]), PromptRow(text, f" no{i}"))
    for i, text in enumerate(workplaces.TEXTS[:6])
)
CLIENT = ClientData(ClientInfo("north", 4), {"train": ROWS[:4], "validation": (), "test": ROWS[3:]})


def workplace_of(reference: Reference) -> Workplace:
    made = workplaces.make_workplace("llama")
    return replace(made, task=Generation(workplaces.TOKENIZER, 32, 4, dpo=Dpo(BETA, reference)))


def bank_of(workplace: Workplace) -> Bank:
    return tiny.bank(workplace.base.spec.targets, experts=2, gate="softmax", dtype=torch.float64)


def log_p(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """The log-probability of an answer, token by token."""
    ids = torch.tensor([[*prompt, *answer]])
    table = model(input_ids=ids).logits[0].log_softmax(-1)
    parts = [table[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    return torch.stack(parts).sum()


def pairs(workplace: Workplace, split: str) -> list[tuple[Any, Any, Any]]:
    def parts(e: Example) -> Any:
        return e.ids[: e.prompt], *e.choices

    return [parts(e) for e in workplace.examples(CLIENT, split)]


def margins(workplace: Workplace, bank: Bank, split: str, before: Bank | None, trainable: Any = ()) -> Any:
    """Every pair's margin against ``before`` (None: the base), and the parameters behind it."""
    model, at = workplace.base.model, []

    def both(prompt: Any, chosen: Any, rejected: Any) -> Tensor:
        return log_p(model, prompt, chosen) - log_p(model, prompt, rejected)

    with torch.no_grad():
        if before is None:
            at = [both(*pair) for pair in pairs(workplace, split)]
        else:
            with attached(model, before):
                at = [both(*pair) for pair in pairs(workplace, split)]
    with attached(model, bank, trainable) as handle:
        now = [both(*pair) for pair in pairs(workplace, split)]
        made = BETA * (torch.stack(now) - torch.stack(at))
        if trainable:
            (-made.sigmoid().log()).mean().backward()
        return made.detach(), {key: p.grad for key, p in handle.parameters.items()}


@pytest.mark.parametrize("reference", ["round", "base"])
def test_two_steps_are_those_of_the_formula(reference: Reference) -> None:
    workplace = workplace_of(reference)
    start = bank = bank_of(workplace)
    losses = []
    for _ in range(2):
        before = start if reference == "round" else None
        made, gradients = margins(workplace, bank, "train", before, bank.tensors)
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        losses.append(float(-made.sigmoid().log().mean()))
        tensors = {key: value - workplaces.RATE * gradients[key] for key, value in bank.tensors.items()}
        bank = replace(bank, tensors=tensors)
    assert (abs(losses[0] - math.log(2)) < 1e-12) == (reference == "round")
    trained = workplaces.train(workplace, start, workplaces.sgd(2), client=CLIENT)
    assert abs(trained.loss - sum(losses) / 2) < 1e-12
    assert workplaces.largest_difference(trained.tensors, bank.tensors) < 1e-12
    assert trained.examples == 8
    assert trained.tokens == 2 * sum(len(p) + len(c) + len(p) + len(r) for p, c, r in pairs(workplace, "train"))


def test_scores_compare_with_the_base_whatever_training_does() -> None:
    workplace = workplace_of("round")
    bank = bank_of(workplace)
    expected, _ = margins(workplace, bank, "test", None)
    for size in (64, 2, 1):  # at least the two answers of a pair share a pass
        (scored,) = LocalCompute(replace(workplace, eval_batch_size=size), CLIENT, 1).score(Score([bank], "test"))
        assert abs(scored.loss - float(-expected.sigmoid().log().mean())) < 1e-12
        assert scored.metrics.keys() == {"reward_accuracy", "margin"}
        assert abs(scored.metrics["margin"] - float(expected.mean())) < 1e-12
        assert scored.metrics["reward_accuracy"] == float((expected > 0).double().mean())


def test_usage_is_that_of_the_chosen_answers() -> None:
    workplace = workplace_of("round")
    bank = bank_of(workplace)
    compute = LocalCompute(workplace, CLIENT, 1)
    (scored,) = compute.score(Score([bank], "test", usage=True))
    plain = replace(workplace, task=Generation(workplaces.TOKENIZER, 32))
    chosen = LocalCompute(replace(plain, cache=type(plain.cache)()), CLIENT, 1).observe(Observe(bank, "test"))
    assert scored.observed is not None
    assert scored.observed.tokens == chosen.tokens == compute.observe(Observe(bank, "test")).tokens
    for module, use in chosen.usage.items():
        assert scored.observed.usage[module].weight == pytest.approx(list(use.weight), abs=1e-12)


@pytest.mark.parametrize(("reference", "passes"), [("round", [4, 4]), ("base", [4, 3])])
def test_what_is_compared_with_is_computed_once(reference: Reference, passes: list[int]) -> None:
    """Three steps of four pairs, twice: one pass for the reference in each round, or one in all."""
    workplace = replace(workplace_of(reference), eval_batch_size=64)
    calls: list[int] = []
    workplace.base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    request = Train(bank_of(workplace), frozenset(), Optim(batch_size=4, steps=3))
    request = replace(request, trainable=frozenset(request.bank.tensors))
    for rnd, expected in enumerate(passes, start=1):
        calls.clear()
        LocalCompute(workplace, CLIENT, rnd).train(request)
        assert len(calls) == expected
