"""Rows of preferences in the forms that people have them in, and their tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

import tiny
from coterie.data.conversations import form_of
from coterie.data.dpo import Dpo
from coterie.data.duplicates import duplicates_of
from coterie.data.files import table_of
from coterie.data.parse import parse
from coterie.data.rows import ChatRow, ClientData, PreferenceRow, PromptRow, Turn
from coterie.data.settings import Columns
from coterie.data.tasks import Generation
from coterie.types import ClientInfo, DataError

PLAIN, CHAT = tiny.tokenizer(), tiny.tokenizer(chat=True)
QUESTION, GOOD, BAD = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "assistant", "content": "No."},
)
ASKED = Turn("user", "Why?")
TALKS = PreferenceRow(ChatRow((ASKED, Turn("assistant", "So."))), ChatRow((ASKED, Turn("assistant", "No."))))


def parsed(record: dict[str, Any], **columns: Any) -> Any:
    rows, labels = parse({"train": table_of("rows", [record])}, Columns(**columns), "generation", None)
    assert labels is None
    return rows["train"][0]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, {}),
        ({"question": "Why?", "a": "So.", "b": "No."}, {"prompt": "question", "chosen": "a", "rejected": "b"}),
        ({"q": "Why", "chosen": "So.", "rejected": "No."}, {"template": "{q}?"}),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "messages": [QUESTION, GOOD]}, {}),
    ],
)
def test_texts(record: dict[str, Any], columns: dict[str, Any]) -> None:
    assert form_of(table_of("rows", [record]), Columns(**columns)) == "preference"
    assert parsed(record, **columns) == PreferenceRow(PromptRow("Why?", "So."), PromptRow("Why?", "No."))


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "Why?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": " Why?\n", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [QUESTION], "chosen": "So.", "rejected": "No."},
        {"prompt": json.dumps([QUESTION]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_conversations(record: dict[str, Any]) -> None:
    row = parsed(record)
    assert row == TALKS
    assert (row.prompt, row.completion) == ("Why?", "So.")


def test_a_column_of_completions_comes_first() -> None:
    record = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert parsed(record, completion="chosen") == PromptRow("Why?", "So.")
    assert parsed({**record, "completion": "Well."}) == PromptRow("Why?", "Well.")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "So."}, "the same answer; leave the row out"),
        ({"chosen": "So.", "rejected": "No."}, "no column 'prompt' that it answers"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": ""}, "the row has no rejected"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": 3}, "rejected is '3', neither a text nor"),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "prompt is '3', neither a text nor"),
        ({"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "How?"}, BAD]}, "before the assistant's"),
        ({"prompt": "How?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, "no user turn before the answer"),
    ],
)
def test_faults_name_the_row(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=rf"^rows, row 1: .*{fault}"):
        parsed(record)


def test_a_pair_counts_as_a_duplicate() -> None:
    client = ClientData(ClientInfo("a", 1), {"train": (TALKS,), "validation": (), "test": (TALKS,)})
    assert duplicates_of([client]) == {"a": {"test in train": 1}}


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_both_answers_follow_the_same_tokens(tokenizer: Any) -> None:
    plain, task = Generation(tokenizer), Generation(tokenizer, dpo=Dpo())
    rows = [PreferenceRow(PromptRow("Why?", "So."), PromptRow("Why?", "No, no."))]
    for row in [*rows, TALKS] if tokenizer is CHAT else rows:
        example = task.encode(row)
        for answer, completion in zip((row.chosen, row.rejected), example.choices, strict=True):
            alone = plain.encode(answer)
            assert (*example.ids[: example.prompt], *completion) == alone.ids
            assert example.prompt == alone.prompt
        assert plain.encode(row) == plain.encode(row.chosen)  # without DPO, a pair trains on its chosen answer


def test_a_long_pair_loses_the_start_of_its_prompt() -> None:
    row = PreferenceRow(PromptRow("abcdefgh", "xy"), PromptRow("abcdefgh", "pqrstuvwxyz"))
    whole, cut = Generation(PLAIN, dpo=Dpo()).encode(row), Generation(PLAIN, 10, dpo=Dpo()).encode(row)
    assert [len(choice) for choice in cut.choices] == [3, 9]
    assert cut.prompt == 1
    assert cut.cut == 2 * (whole.prompt - 1) + 3
    same = PreferenceRow(PromptRow("a", "wxyz"), PromptRow("a", "wxyzv"))
    with pytest.raises(DataError, match="both answers have the same first 3 tokens"):
        Generation(PLAIN, 4, dpo=Dpo()).encode(same)
