"""Rows become tokens, batches and a loss that is summed over what counts."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from coterie.data.examples import IGNORE, Batch, Example, batches
from coterie.data.rows import ChoiceRow, PromptRow, TextRow
from coterie.data.tasks import Classification, Generation, MultipleChoice, make_task
from coterie.data.truncation import Truncation
from coterie.ops.streams import stream
from coterie.types import CoterieError, TaskKind

BOS, EOS = 1, 2
PLAIN = tiny.tokenizer()
TYPED = tiny.tokenizer(token_types=True)
CHAT = tiny.tokenizer(chat=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(text: str, tokenizer: Any = PLAIN) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# classification ------------------------------------------------------------------------------------------------------


def test_one_text_and_a_pair_are_encoded_as_the_tokenizer_does() -> None:
    one, pair = TextRow("abc", 2), TextRow("abc", 1, "de")
    assert Classification(PLAIN).encode(one) == Example((BOS, *words("abc"), EOS), label=2)
    assert Classification(TYPED).encode(one) == Example((BOS, *words("abc"), EOS), (0,) * 5, label=2)
    ids = (BOS, *words("abc"), EOS, *words("de"), EOS)
    assert Classification(PLAIN).encode(pair) == Example(ids, label=1)
    assert Classification(TYPED).encode(pair) == Example(ids, (0,) * 5 + (1,) * 3, label=1)


@pytest.mark.parametrize("row", [TextRow("abcdefghij", 0), TextRow("abcdefgh", 0, "abcdefgh")])
def test_a_long_text_is_cut_and_keeps_its_special_tokens(row: TextRow) -> None:
    example = Classification(TYPED, max_length=7).encode(row)
    assert len(example.ids) == len(example.types or ()) == 7
    assert (example.ids[0], example.ids[-1]) == (BOS, EOS)
    assert example.ids.count(EOS) == (2 if row.text_pair else 1)


def test_collate_pads_on_the_right() -> None:
    task = Classification(TYPED)
    batch = task.collate([task.encode(TextRow("abcd", 2)), task.encode(TextRow("a", 0, "b"))])
    short = [BOS, *words("a"), EOS, *words("b"), EOS]
    assert batch.inputs["input_ids"].tolist() == [[BOS, *words("abcd"), EOS], [*short, 0]]
    assert batch.mask.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert batch.count == 2
    assert "token_type_ids" not in Classification(PLAIN).collate([Example((1, 2))]).inputs


def test_the_loss_of_a_classification_is_a_sum_over_examples() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=torch.float64)
    batch = Batch({}, torch.tensor([1, 0]), 2)
    by_hand = -sum(row.softmax(0)[label].log() for row, label in zip(logits, [1, 0], strict=True))
    loss = Classification(PLAIN).loss(logits, batch)
    torch.testing.assert_close(loss, by_hand, atol=1e-14, rtol=0)
    coarse = Classification(PLAIN).loss(logits.bfloat16(), batch)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.double(), Classification(PLAIN).loss(logits.bfloat16().double(), batch))


# generation ----------------------------------------------------------------------------------------------------------


def test_a_completion_follows_its_prompt_and_ends_the_text() -> None:
    example = Generation(PLAIN).encode(PromptRow("ab", " cd"))
    assert example == Example((BOS, *words("ab"), *words(" cd"), EOS), prompt=1 + len(words("ab")))
    batch = Generation(PLAIN).collate([example, Generation(PLAIN).encode(PromptRow("a", "b"))])
    assert batch.labels.tolist() == [
        [IGNORE] * 3 + [*words(" cd"), EOS],
        [IGNORE] * 2 + [*words("b"), EOS] + [IGNORE] * 3,
    ]
    assert batch.count == 4 + 2
    assert batch.mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]


def test_the_padding_token_may_be_the_end_of_text() -> None:
    shared = tiny.tokenizer()
    shared.pad_token = shared.eos_token
    task = Generation(shared)
    rows = [PromptRow("ab", "cd"), PromptRow("a", "b")]
    plain = Generation(PLAIN).collate([Generation(PLAIN).encode(row) for row in rows])
    batch = task.collate([task.encode(row) for row in rows])
    assert batch.labels.tolist() == plain.labels.tolist()
    assert batch.labels[1].tolist().count(EOS) == 1


def test_a_prompt_goes_through_the_chat_template() -> None:
    example = Generation(CHAT).encode(PromptRow("hi", "yo"))
    prompt = words("<user>hi</s><assistant>", CHAT)
    assert EOS in prompt
    assert example == Example((*prompt, *words("yo", CHAT), EOS), prompt=len(prompt))
    assert Generation(CHAT).collate_prompts([PromptRow("hi", "yo")])["input_ids"].tolist() == [prompt]


@given(prompt=st.integers(0, 30), completion=st.integers(0, 30), max_length=st.integers(2, 24), chat=st.booleans())
def test_an_over_long_row_loses_the_start_of_its_prompt_then_the_end_of_its_completion(
    prompt: int, completion: int, max_length: int, chat: bool
) -> None:
    tokenizer = CHAT if chat else PLAIN
    row = PromptRow("p" * prompt, "c" * completion)
    whole, task = Generation(tokenizer, 10_000).encode(row), Generation(tokenizer, max_length)
    cut = task.encode(row)
    kept = len(cut.ids) - cut.prompt
    assert len(cut.ids) == min(max_length, len(whole.ids))
    assert cut.prompt >= 1
    assert kept == min(completion + 1, max_length - 1)
    assert cut.ids[: cut.prompt] == whole.ids[whole.prompt - cut.prompt : whole.prompt]
    assert cut.ids[cut.prompt :] == whole.ids[whole.prompt :][:kept]


def test_a_prompt_without_tokens_is_the_token_that_starts_or_ends_a_text() -> None:
    class Fake:
        chat_template = None

        def __init__(self, bos: int | None, eos: int | None) -> None:
            self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, 9

        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    starts = [
        Generation(Fake(bos, eos)).prompt_ids(PromptRow("", "x")) for bos, eos in ((0, 5), (None, 5), (None, None))
    ]
    assert starts == [[0], [5], [9]]
    assert Generation(Fake(0, None)).encode(PromptRow("", "x")) == Example((0, ord("x")), prompt=1)
    with pytest.raises(CoterieError, match="completion '' has no token"):
        Generation(Fake(0, None)).encode(PromptRow("a", ""))


ROWS = [PromptRow("abc", "d"), PromptRow("a", "bcdef"), PromptRow("zz top", ""), PromptRow("", "xy")]


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_counts_the_tokens_of_the_completions_alone(chat: bool) -> None:
    """Against -log p(token | all tokens before it), asked token by token of a tiny Llama without any padding."""
    model = tiny.model("llama", "generation").double()
    task = Generation(CHAT if chat else PLAIN)
    examples = [task.encode(row) for row in ROWS]
    batch = task.collate(examples)
    with torch.no_grad():
        loss = task.loss(model(**batch.inputs).logits, batch)
        terms = [
            -model(input_ids=torch.tensor([e.ids[:end]])).logits[0, -1].log_softmax(-1)[e.ids[end]]
            for e in examples
            for end in range(e.prompt, len(e.ids))
        ]
    assert len(terms) == batch.count == sum(len(words(row.completion)) + 1 for row in ROWS)
    torch.testing.assert_close(loss, torch.stack(terms).sum(), atol=1e-9, rtol=0)


def test_prompts_are_padded_on_the_left_and_cut_at_their_start() -> None:
    task = Generation(PLAIN, max_length=6)
    inputs = task.collate_prompts([PromptRow("abcdefgh", "x"), PromptRow("a", "y")])
    assert inputs["input_ids"].tolist() == [words("defgh"), [0, 0, 0, BOS, *words("a")]]
    assert inputs["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]


def test_make_task() -> None:
    assert make_task("classification", PLAIN, 9) == Classification(PLAIN, 9)
    assert make_task("generation", PLAIN, 9, 3, True) == Generation(PLAIN, 9, 3, True)
    assert make_task("multiple_choice", PLAIN, 9) == MultipleChoice(PLAIN, 9)
    assert [make_task(kind, PLAIN, 9).kind for kind in get_args(TaskKind)] == list(get_args(TaskKind))


# batches -------------------------------------------------------------------------------------------------------------


def numbered(lengths: list[int]) -> list[Example]:
    return [Example((1,) * length, label=i) for i, length in enumerate(lengths)]


@given(lengths=st.lists(st.integers(1, 30), max_size=60), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_batches_hold_every_example_exactly_once(lengths: list[int], size: int, seed: int) -> None:
    examples = numbered(lengths)
    made = batches(examples, size, stream(seed))
    assert sorted(e.label for part in made for e in part) == list(range(len(lengths)))
    assert len(made) == -(-len(lengths) // size)
    assert all(1 <= len(part) <= size for part in made)
    assert sum(len(part) < size for part in made) <= 1
    assert batches(examples, size, stream(seed)) == made


def test_batches_are_another_order_for_another_generator() -> None:
    examples = numbered([5] * 40)
    orders = {tuple(e.label for part in batches(examples, 4, stream(seed)) for e in part) for seed in range(5)}
    assert len(orders) == 5


def padding(made: list[list[Example]]) -> int:
    return sum(max(len(e.ids) for e in part) * len(part) - sum(len(e.ids) for e in part) for part in made)


def test_batches_put_similar_lengths_together_and_in_no_order() -> None:
    examples = numbered([1 + i % 32 for i in range(256)])
    made = batches(examples, 8, stream(0))
    order = torch.randperm(256, generator=stream(0)).tolist()
    at_random = [[examples[i] for i in order[j : j + 8]] for j in range(0, 256, 8)]
    assert padding(made) < padding(at_random) / 2
    one_chunk = numbered(list(range(1, 9)))
    firsts = {len(batches(one_chunk, 2, stream(seed))[0][0].ids) for seed in range(20)}
    assert firsts == {1, 3, 5, 7}, "short batches do not come first"
    assert len(Counter(len(e.ids) for e in made[0])) > 1, "lengths are similar, not the same: the order stays random"


# truncation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(TaskKind))
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_what_a_row_loses_is_what_a_longer_limit_keeps(kind: TaskKind, tokenizer: Any) -> None:
    rows: dict[TaskKind, list[Any]] = {
        "classification": [TextRow("abc", 0), TextRow("abcdefgh", 1), TextRow("abcdef", 0, "abcdefgh")],
        "generation": [PromptRow("a", " b"), PromptRow("abcdefgh", " b"), PromptRow("ab", " abcdefghij")],
        "multiple_choice": [ChoiceRow("a", ("b", "cc"), 1), ChoiceRow("abcdefgh", ("bb", "c"), 0)],
    }
    short, long = (make_task(kind, tokenizer, length) for length in (7, 1000))
    cut, whole = [short.encode(row) for row in rows[kind]], [long.encode(row) for row in rows[kind]]
    assert [example.cut for example in whole] == [0] * len(whole)
    assert [example.cut for example in cut] == [len(w.ids) - len(c.ids) for c, w in zip(cut, whole, strict=True)]
    total = Truncation.of(cut) + Truncation.of(whole)
    assert (total.rows, total.tokens) == (2 * len(cut), sum(example.cut for example in cut))
    assert 0 < total.cut <= len(cut)
    assert f"{total.cut} of {total.rows} rows are longer than [model] max_length" in str(total)


def test_a_row_of_just_the_longest_length_loses_nothing() -> None:
    assert Classification(PLAIN, max_length=5).encode(TextRow("abc", 0)).cut == 0
    assert Classification(PLAIN, max_length=5).encode(TextRow("abcd", 0)).cut == 1
