"""Conversations become tokens, of which the loss counts what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from coterie.compute.tokens import Packed
from coterie.data.chat import Rendered, fit, gaps, render
from coterie.data.examples import IGNORE
from coterie.data.rows import ChatRow, PromptRow, Turn
from coterie.data.tasks import Generation
from coterie.types import DataError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = (
    Turn("system", "be brief"),
    Turn("user", "hi"),
    Turn("assistant", "yo"),
    Turn("user", "how?"),
    Turn("assistant", "well"),
)


def tokenizer(template: str | None) -> Any:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def counted(template: str, row: tuple[Turn, ...] = TURNS, **options: Any) -> tuple[str, list[str]]:
    """The text that the model reads, and the texts that the loss counts."""
    words = tokenizer(template)
    task = Generation(words, **options)
    example = task.encode(ChatRow(row))
    labels = task.collate([example]).labels[0].tolist()
    spans, inside = [], False
    for token, label in zip(example.ids, labels, strict=True):
        if label != IGNORE:
            assert label == token
            spans = [*spans[:-1], [*spans[-1], token]] if inside else [*spans, [token]]
        inside = label != IGNORE
    return words.decode(example.ids), [words.decode(span) for span in spans]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by prefix", "by marks"])
@pytest.mark.parametrize(("turns", "said"), [("all", ["yo</s>", "well</s>"]), ("last", ["well</s>"])])
def test_the_loss_counts_what_the_assistant_says(template: str, turns: Any, said: list[str]) -> None:
    text, spans = counted(template, turns=turns)
    assert spans == said
    assert text == "<system>be brief</s>\n<user>hi</s>\n<assistant>yo</s>\n<user>how?</s>\n<assistant>well</s>"


PAIR = st.tuples(st.text("ab c\n.", min_size=1, max_size=6), st.text("ab c.", min_size=1, max_size=6))


@given(st.lists(PAIR, min_size=1, max_size=4), st.sampled_from(["all", "last"]))
def test_marks_and_prefixes_count_the_same_tokens(pairs: list[tuple[str, str]], trained: Any) -> None:
    turns = [Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    assert render(tokenizer(TEMPLATE), turns, trained) == render(tokenizer(MARKED), turns, trained)


def test_turns_after_the_last_answer_are_left_out() -> None:
    assert counted(TEMPLATE, (*TURNS, Turn("user", "and?"))) == counted(TEMPLATE)


def test_a_conversation_is_answered_after_the_prompt_of_its_last_answer() -> None:
    task = Generation(tokenizer(TEMPLATE))
    ids, example = task.prompt_ids(ChatRow(TURNS)), task.encode(ChatRow(TURNS))
    assert tuple(ids) == example.ids[: len(ids)]
    start = len(example.ids) - len(task.tokenizer("well</s>", add_special_tokens=False)["input_ids"])
    assert len(ids) == start


@given(st.integers(2, 60), st.lists(st.integers(0, 7), min_size=2, max_size=9))
def test_a_conversation_that_is_too_long_keeps_its_end(longest: int, sizes: list[int]) -> None:
    edges = [3]
    for size in sizes:
        edges.append(edges[-1] + size + 1)
    spans = tuple(zip(edges[::2], edges[1::2], strict=False))
    rendered = Rendered(tuple(range(edges[-1] + 2)), spans)
    kept = fit(rendered, longest)
    start, end = spans[-1]
    last = min(end, start + longest - 1)
    assert kept.ids == rendered.ids[max(0, last - longest) : last]
    marked = [rendered.ids.index(kept.ids[i]) for a, b in kept.spans for i in range(a, b)]
    assert marked == [i for a, b in spans for i in range(a, b) if max(0, last - longest) < i < last]
    assert all(after > before for before, after in gaps(kept))


def test_an_answer_that_follows_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="puts no token before the assistant's answer"):
        fit(Rendered((7,), ((0, 1),)), 10)


def test_what_is_cut_is_counted() -> None:
    whole = Generation(tokenizer(TEMPLATE)).encode(ChatRow(TURNS))
    short = Generation(tokenizer(TEMPLATE), max_length=20).encode(ChatRow(TURNS))
    assert (whole.cut, short.cut) == (0, len(whole.ids) - 20)
    assert short.ids == whole.ids[-20:]
    assert Generation(tokenizer(TEMPLATE)).collate([whole]).count == len("yo") + len("well") + 2


def test_examples_keep_their_spans_when_they_are_packed() -> None:
    examples = [Generation(tokenizer(TEMPLATE)).encode(row) for row in (ChatRow(TURNS), PromptRow("a", "b"))]
    assert examples[0].skipped
    assert Packed.of(examples).examples() == examples


def test_an_answer_that_the_template_rewrites_later_is_refused() -> None:
    forgetful = TEMPLATE.replace("m['content']", "(m['content'] if m['role'] == 'user' or loop.last else 'thought')")
    with pytest.raises(DataError, match='turns = "last"'):
        counted(forgetful)
    assert counted(forgetful, turns="last")[1] == ["well</s>"]


def test_a_template_may_refuse_a_conversation() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    with pytest.raises(DataError, match="refuses the conversation: no system turn"):
        counted(refusing)
    assert counted(refusing, TURNS[1:])[1] == ["yo</s>", "well</s>"]


def test_conversations_need_a_template() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        Generation(tokenizer(None)).encode(ChatRow(TURNS))
