"""Drawn completions: those of :func:`next_token`, token by token, and the same whatever shares the pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
import workplaces
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.config.sections import TaskSettings
from coterie.data.rows import ClientData
from coterie.data.tasks import Generation
from coterie.nn.attach import attached
from coterie.ops.sampling import Sampling, next_token
from coterie.ops.streams import stream
from coterie.requests import Score
from coterie.types import Bank

NEW, SAMPLING = 5, Sampling(1.3, 0.9)


def workplace_of(sampling: Sampling, **settings: Any) -> Workplace:
    made = workplaces.make_workplace("llama", **settings)
    task = Generation(workplaces.TOKENIZER, 32, NEW, True, scores=("exact_match",), sampling=sampling)
    return replace(made, task=task)


def by_hand(workplace: Workplace, client: ClientData, bank: Bank, rnd: int) -> list[str]:
    """One text at a time, without a cache."""
    task, texts = workplace.task, []
    assert isinstance(task, Generation)
    with attached(workplace.base.model, bank), torch.no_grad():
        for number, row in enumerate(client.splits["test"]):
            draw = stream(workplace.seed, client.info.id, "text", number)
            ids = list(task.encode_prompt(row).ids)
            made: list[int] = []
            while len(made) < NEW and made[-1:] != [task.tokenizer.eos_token_id]:
                logits = workplace.base.model(input_ids=torch.tensor([ids + made])).logits[0, -1]
                made.append(next_token(logits.float(), SAMPLING.temperature, SAMPLING.top_p, draw))
            texts.append(task.tokenizer.batch_decode(torch.tensor([made]), skip_special_tokens=True)[0])
    return texts


def drawn(workplace: Workplace, client: ClientData, bank: Bank, rnd: int = 1) -> list[str]:
    (scored,) = LocalCompute(workplace, client, rnd).score(Score([bank], "test", samples=9))
    return [sample.generated for sample in scored.samples]


def test_texts_are_drawn_from_each_rows_own_stream() -> None:
    workplace = workplace_of(SAMPLING)
    names = ("north", "a client with fewer rows")
    clients = [workplaces.client_of(workplace, name) for name in names]
    clients[1] = replace(clients[1], splits={**clients[1].splits, "test": clients[1].splits["test"][:2]})
    bank = tiny.bank(workplace.base.spec.targets, experts=2, gate="softmax", dtype=torch.float64)
    expected = [by_hand(workplace, client, bank, 1) for client in clients]
    assert [len(texts) for texts in expected] == [5, 2]
    assert expected[0][:2] != expected[1]
    for size in (64, 2):
        workplace.eval_batch_size = size
        assert [drawn(workplace, client, bank, rnd) for rnd, client in enumerate(clients, 1)] == expected
        asked = [(LocalCompute(workplace, client, 1), Score([bank], "test", samples=9)) for client in clients]
        for scored, texts in zip(answer_all(asked, print), expected, strict=True):
            assert isinstance(scored, list)
            assert [sample.generated for sample in scored[0].samples] == texts  # type: ignore[union-attr]
    other = replace(workplace, seed=1)
    assert drawn(other, clients[0], bank) != expected[0]


def test_without_a_temperature_the_most_likely_tokens() -> None:
    greedy, cold = workplace_of(Sampling()), workplace_of(Sampling(1e-6))
    client = workplaces.client_of(greedy)
    bank = tiny.bank(greedy.base.spec.targets, dtype=torch.float64)
    assert drawn(greedy, client, bank) == drawn(cold, client, bank)


def test_top_p_alone_would_do_nothing() -> None:
    assert TaskSettings(kind="generation", generate=True, temperature=0.7, top_p=0.9).top_p == 0.9
    with pytest.raises(ValueError, match="top_p counts only where tokens are drawn"):
        TaskSettings(kind="generation", top_p=0.9)


@pytest.mark.parametrize(
    ("setting", "mends"),
    [
        ({"temperature": 0.7}, "temperature counts only where text is generated; set generate = true"),
        ({"beta": 0.2}, 'beta counts only with objective = "dpo"'),
        ({"reference": "base"}, 'reference counts only with objective = "dpo"'),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(setting: dict[str, Any], mends: str) -> None:
    with pytest.raises(ValueError, match=mends):
        TaskSettings(kind="generation", **setting)
