"""Multiple choice: candidates after a prompt, scored by their mean loss per token, against one sequence at a time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from coterie.compute import passes
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.examples import IGNORE, Batch, Example, candidate, completion_losses
from coterie.data.rows import ChoiceRow, ClientData, PromptRow
from coterie.data.tasks import Generation, MultipleChoice
from coterie.nn.attach import attached
from coterie.nn.base import Base, load_base
from coterie.ops.metrics import classification_metrics
from coterie.ops.streams import stream
from coterie.requests import Optim, Score, Scored, Train
from coterie.types import Bank, ClientInfo, CoterieError

BOS, EOS = 1, 2
PLAIN = tiny.tokenizer()
CHAT = tiny.tokenizer(chat=True)
OWN = (  # candidates of different numbers and lengths, the right one at every position
    ChoiceRow("ab", ("c", "defgh ijk"), 0),
    ChoiceRow("a much longer prompt than the others", (" x", " yy", " zzz zzz"), 2),
    ChoiceRow("q", ("a long candidate", "b"), 1),
    ChoiceRow("what now", (" stop", " go", " wait", " turn around"), 1),
    ChoiceRow("xyz", ("1", "22", "333"), 0),
    ChoiceRow("so", (" it is", " it is not"), 1),
)
PROMPTS = ["ab", "some more words", "x", "a longer text than that", "two words", "abc abc", "q", "the end", "y z"]
SHARED = tuple(ChoiceRow(text, (" no", " yes indeed", " perhaps"), i % 3) for i, text in enumerate(PROMPTS))
LABELS = ("no", "yes indeed", "perhaps")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(text: str, tokenizer: Any = PLAIN) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# encoding ------------------------------------------------------------------------------------------------------------


def test_the_right_candidate_follows_the_prompt() -> None:
    example = MultipleChoice(PLAIN).encode(ChoiceRow("ab", (" c", " de"), 1))
    choices = ((*words(" c"), EOS), (*words(" de"), EOS))
    assert example == Example((BOS, *words("ab"), *choices[1]), label=1, prompt=3, choices=choices)
    assert candidate(example, 1).ids == example.ids
    assert candidate(example, 0).ids == (BOS, *words("ab"), *choices[0])
    assert candidate(example, 0).prompt == 3


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_training_sees_what_generation_of_the_right_candidate_sees(tokenizer: Any) -> None:
    task, other = MultipleChoice(tokenizer), Generation(tokenizer)
    examples = [task.encode(row) for row in OWN]
    completions = [other.encode(PromptRow(row.prompt, row.choices[row.answer])) for row in OWN]
    assert [(e.ids, e.prompt) for e in examples] == [(e.ids, e.prompt) for e in completions]
    one, two = task.collate(examples), other.collate(completions)
    assert torch.equal(one.labels, two.labels)
    assert one.count == two.count
    logits = torch.randn(*one.labels.shape, 300, generator=stream(0))
    assert torch.equal(task.loss(logits, one), other.loss(logits, two))


def test_all_candidates_of_an_over_long_row_follow_the_same_prompt() -> None:
    row = ChoiceRow("p" * 30, ("c", "d" * 9), 0)
    example = MultipleChoice(PLAIN, max_length=16).encode(row)
    assert example.prompt == 16 - 10
    assert example.ids[:6] == words("p" * 6)
    assert [len(candidate(example, j).ids) for j in (0, 1)] == [8, 16]
    short = MultipleChoice(PLAIN, max_length=6).encode(row)
    assert short.prompt == 1
    assert short.choices == ((*words("c"), EOS), words("d" * 5))


def test_candidates_that_are_the_same_once_they_are_cut() -> None:
    with pytest.raises(
        CoterieError, match=r"same tokens, of aaaaaaaab, aaaaaaaac: .* their first 4 tokens; raise \[model\]"
    ):
        MultipleChoice(PLAIN, max_length=5).encode(ChoiceRow("p", ("aaaaaaaab", "aaaaaaaac"), 0))


def test_a_candidate_is_tokenised_once() -> None:
    seen: list[str] = []

    class Counting:
        chat_template, bos_token_id, eos_token_id, pad_token_id = None, BOS, EOS, 0

        def __call__(self, text: str, **options: bool) -> Any:
            seen.append(text)
            return PLAIN(text, **options)

    task = MultipleChoice(Counting())
    for row in SHARED:
        task.encode(row)
    assert sorted(seen) == sorted([*PROMPTS, " no", " yes indeed", " perhaps"])


def test_losses_of_completions_count_their_tokens_alone() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 2, 0, IGNORE], [IGNORE, 1, 1, 3, 2]])
    logits = torch.randn(2, 5, 4, generator=stream(1))
    logits[0, 0], logits[0, 3:], logits[1, 4] = torch.nan, torch.inf, torch.nan  # nothing there is looked at
    by_hand = [
        -sum(logits[row, end - 1].log_softmax(-1)[labels[row, end]] for end in ends)
        for row, ends in ((0, (2, 3)), (1, (1, 2, 3, 4)))
    ]
    found = completion_losses(logits, Batch({}, labels, 6))
    torch.testing.assert_close(found.float(), torch.stack(by_hand))  # type: ignore[arg-type]
    coarse = completion_losses(logits.bfloat16(), Batch({}, labels, 6))
    assert torch.equal(coarse, completion_losses(logits.bfloat16().float(), Batch({}, labels, 6)))


# scoring -------------------------------------------------------------------------------------------------------------


@cache
def loaded(arch: str, dtype: torch.dtype) -> Base:
    with tempfile.TemporaryDirectory() as folder:
        tiny.folder(Path(folder), arch)
        return load_base(folder, "multiple_choice", dtype=dtype)


def make_workplace(arch: str, dtype: torch.dtype = torch.float64, tokenizer: Any = PLAIN, **settings: Any) -> Workplace:
    return Workplace(loaded(arch, dtype), MultipleChoice(tokenizer, 80), 0, **settings)


def client_of(rows: tuple[ChoiceRow, ...], labels: tuple[str, ...] | None) -> ClientData:
    """A client for these rows; its name is theirs, since a workplace keeps what it tokenised by name."""
    name = " ".join(f"{row.prompt}/{row.answer}" for row in rows)
    return ClientData(ClientInfo(name, len(rows), labels=labels), {"train": rows, "test": rows})


def bank_for(workplace: Workplace) -> Bank:
    """Three experts whose gate looks at every token: a token of padding that counted would show."""
    dtype = next(workplace.base.model.parameters()).dtype
    return tiny.bank(workplace.base.spec.targets, experts=3, gate="slot_top_k", options={"own": 0}, dtype=dtype)


def score(workplace: Workplace, client: ClientData, bank: Bank) -> Scored:
    (scored,) = LocalCompute(workplace, client, 1).score(Score([bank], "test"))
    return scored


def by_hand(workplace: Workplace, bank: Bank, rows: tuple[ChoiceRow, ...]) -> list[list[Tensor]]:
    """The losses of the tokens of every candidate of every row: one sequence at a time, nothing padded or shared."""
    tokenizer, found = workplace.task.tokenizer, []
    with attached(workplace.base.model, bank), torch.no_grad():
        for row in rows:
            start = (BOS, *words(row.prompt))
            if tokenizer.chat_template:
                start = words(f"<user>{row.prompt}</s><assistant>", tokenizer)
            losses = []
            for choice in row.choices:
                ids = [*start, *words(choice, tokenizer), EOS]
                logits = workplace.base.model(input_ids=torch.tensor([ids])).logits[0]
                ends = range(len(start), len(ids))
                losses.append(torch.stack([-logits[end - 1].log_softmax(-1)[ids[end]] for end in ends]))
            found.append(losses)
    return found


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("arch", tiny.DECODERS)
def test_scores_are_those_of_single_sequences(arch: str, tokenizer: Any) -> None:
    workplace = make_workplace(arch, tokenizer=tokenizer)
    bank, truth = bank_for(workplace), [row.answer for row in SHARED]
    losses = by_hand(workplace, bank, SHARED)
    predicted = [int(torch.stack([loss.mean() for loss in row]).argmin()) for row in losses]
    by_sum = [int(torch.stack([loss.sum() for loss in row]).argmin()) for row in losses]
    assert len(set(predicted)) > 1
    assert predicted != by_sum, "so that the mean and the sum differ"
    right = torch.cat([row[answer] for row, answer in zip(losses, truth, strict=True)])
    found = score(workplace, client_of(SHARED, LABELS), bank)
    assert found.metrics == classification_metrics(truth, predicted)
    assert found.loss == pytest.approx(float(right.mean()), rel=1e-12)
    assert found.examples == len(SHARED)


@pytest.mark.parametrize("arch", tiny.DECODERS)
@pytest.mark.parametrize("rows", [OWN, SHARED], ids=["own", "shared"])
def test_the_batch_size_changes_nothing(arch: str, rows: tuple[ChoiceRow, ...]) -> None:
    """Each row as a client of its own too: then accuracy is whether its prediction is right."""
    workplace = make_workplace(arch, torch.float32)
    bank = bank_for(workplace)
    means = [[float(loss.mean()) for loss in row] for row in by_hand(workplace, bank, rows)]
    expected = [row.answer == mean.index(min(mean)) for row, mean in zip(rows, means, strict=True)]
    assert 0 < sum(expected) < len(rows)
    whole = []
    for size in (1, 2, 5, 64):
        workplace.eval_batch_size = size
        found = [bool(score(workplace, client_of((row,), None), bank).metrics["accuracy"]) for row in rows]
        assert found == expected
        whole.append(score(workplace, client_of(rows, None), bank))
    assert [scored.metrics for scored in whole] == [{"accuracy": sum(expected) / len(rows)}] * 4
    assert all(scored.loss == pytest.approx(whole[0].loss, rel=1e-5) for scored in whole)


def test_a_place_means_something_only_where_all_rows_have_the_same_candidates() -> None:
    workplace = make_workplace("llama")
    assert score(workplace, client_of(OWN, None), Bank({})).metrics.keys() == {"accuracy"}
    found = score(workplace, client_of(SHARED, LABELS), Bank({})).metrics
    assert found.keys() == {"accuracy", "macro_f1", "matthews"}


@pytest.mark.parametrize("arch", tiny.DECODERS)
@pytest.mark.parametrize("gate", ["slot_top_k", "similarity"])
def test_candidates_share_their_prompt(arch: str, gate: str) -> None:
    """The scores and the use of experts are those of whole rows, with fewer tokens; also in shared passes."""
    shared = make_workplace(arch)
    whole = replace(shared, base=replace(shared.base, prompt_cache=None))
    assert shared.base.prompt_cache is not None
    slots, options, experts = (None, {"own": 0}, 3) if gate == "slot_top_k" else (1, {"scale": 1.0}, 2)
    targets = shared.base.spec.targets
    bank = tiny.bank(targets, experts, gate=gate, options=options, slots=slots, dtype=torch.float64)
    tokens: list[int] = []
    handle = shared.base.model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    clients = [client_of(OWN, None), client_of(SHARED, LABELS)]
    request, found, passed = Score([bank], "test", usage=True), [], []
    for workplace in (whole, shared):
        workplace.eval_batch_size = 1  # no padding, and as many rows as candidates
        tokens.clear()
        found.append([LocalCompute(workplace, client, 1).score(request)[0] for client in clients])
        passed.append(sum(tokens))
    handle.remove()
    examples = [e for client in clients for e in whole.examples(client, "test")]
    saved = sum((len(e.choices) - 1) * e.prompt for e in examples)
    assert saved > 0
    assert passed[0] - passed[1] == saved
    shared.eval_batch_size = 4
    together = answer_all([(LocalCompute(shared, client, 1), request) for client in clients], print)
    for one, *others in zip(*found, (scores[0] for scores in together), strict=True):  # type: ignore[index]
        for other in others:
            assert other.loss == pytest.approx(one.loss, rel=1e-12)
            assert other.metrics == one.metrics
            assert other.observed.tokens == one.observed.tokens
            for module, use in one.observed.usage.items():
                assert other.observed.usage[module].weight == pytest.approx(list(use.weight), rel=1e-9)


def test_a_prompt_is_not_shared_where_rows_may_be_too_long_for_it() -> None:
    workplace = make_workplace("llama")
    cache, most = workplace.base.prompt_cache, workplace.task.max_length
    assert cache is not None
    for longest, shares in ((most, True), (most - 1, False)):
        workplace.base = replace(workplace.base, prompt_cache=replace(cache, longest=longest))
        assert (workplace.prompt_cache is not None) == shares


def test_on_a_tie_the_first_candidate_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace("llama")
    workplace.base = replace(workplace.base, prompt_cache=None)

    def zeros(workplace: Workplace, inputs: Any) -> torch.Tensor:
        return torch.zeros(*inputs["input_ids"].shape, tiny.VOCABULARY)

    monkeypatch.setattr(passes, "logits_of", zeros)
    rows = tuple(replace(row, answer=0) for row in SHARED)
    assert score(workplace, client_of(rows, LABELS), Bank({})).metrics["accuracy"] == 1.0


def test_training_is_that_of_generation_and_makes_the_right_candidates_likely() -> None:
    optim = Optim(learning_rate=0.02, batch_size=4, epochs=12)
    workplace = make_workplace("llama")
    client = client_of(SHARED, LABELS)
    bank = tiny.bank(workplace.base.spec.targets, rank=8, dtype=torch.float64)
    request = Train(bank, frozenset(bank.tensors), optim)
    trained = LocalCompute(workplace, client, 1).train(request)
    other = replace(workplace, task=Generation(PLAIN, 80), cache={})
    rows = tuple(PromptRow(row.prompt, row.choices[row.answer]) for row in SHARED)
    expected = LocalCompute(other, replace(client, splits={"train": rows}), 1).train(request)
    assert trained.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(trained.tensors[key], expected.tensors[key]) for key in expected.tensors)
    assert trained.loss == expected.loss
    before, after = score(workplace, client, bank), score(workplace, client, replace(bank, tensors=trained.tensors))
    assert after.loss < 0.6 * before.loss
    assert after.metrics["accuracy"] > before.metrics["accuracy"]
