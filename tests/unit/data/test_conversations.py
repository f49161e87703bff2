"""Rows of generation in the forms that people have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from coterie.data.clients import load_data
from coterie.data.conversations import unanswered
from coterie.data.files import read_table, table_of
from coterie.data.parse import parse
from coterie.data.rows import ChatRow, PromptRow, Turn
from coterie.data.settings import Columns, DataSettings
from coterie.types import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
ROW = ChatRow((Turn("user", "hi"), Turn("assistant", "yo")))


def rows(*records: dict[str, object], **columns: Any) -> tuple[Any, ...]:
    found, labels = parse({"train": table_of("file", records)}, Columns(**columns), "generation", None)
    assert labels is None
    return found["train"]


@pytest.mark.parametrize(
    ("record", "columns", "row"),
    [
        ({"messages": CHAT}, {}, ROW),
        ({"conversations": SHARED}, {}, ChatRow((Turn("system", "s"), *ROW.turns))),
        ({"conversations": CHAT}, {}, ROW),
        ({"talk": json.dumps(CHAT)}, {"messages": "talk"}, ROW),
        ({"instruction": "add", "input": "1 2", "output": "3"}, {}, PromptRow("add\n\n1 2", "3")),
        ({"instruction": "add", "input": "", "output": "3"}, {}, PromptRow("add", "3")),
        ({"instruction": "add", "output": "3"}, {}, PromptRow("add", "3")),
        ({"prompt": "p", "completion": "c", "messages": CHAT}, {}, PromptRow("p", "c")),
        ({"prompt": "p", "completion": "c", "messages": CHAT}, {"messages": "messages"}, ROW),
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, {"completion": "chosen"}, PromptRow("p", "c")),
    ],
)
def test_the_columns_say_the_form(record: dict[str, object], columns: dict[str, str], row: object) -> None:
    assert rows(record, **columns) == (row,)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("hi", r"not a list of turns"),
        ([], r"the row has no messages|not a list of turns"),
        (["hi"], r"messages\[0\] is 'hi', not a turn"),
        ([{"role": "narrator", "content": "x"}], r"messages\[0\] has the role 'narrator'; the roles are system,"),
        ([{"content": "x"}], r"has the role None"),
        ([CHAT[0], {"role": "assistant", "content": ""}], r"messages\[1\] has the content '', not text"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], r"not text"),
        ([CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [{}]}], r"calls tools"),
        ([CHAT[1], CHAT[0]], r"no turn of the assistant after another's"),
        ([CHAT[0]], r"no turn of the assistant"),
        ([CHAT[0], {"role": "assistant", "content": "x" * 1_000_001}], r"1,000,001 characters"),
        (CHAT * 501, r"1,002 turns, more than 1,000"),
    ],
)
def test_a_turn_that_is_wrong_is_named(value: object, fault: str) -> None:
    with pytest.raises(DataError, match=fault) as caught:
        rows({"messages": CHAT}, {"messages": value})
    assert "file, row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"instruction": " ", "output": "3"}, "no instruction"),
        ({"instruction": "add", "output": ""}, "no output"),
        ({"instruction": "add", "input": 3, "output": "x"}, "input is 3, not text"),
    ],
)
def test_an_incomplete_row_is_named(record: dict[str, object], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        rows(record)


def test_parquet_and_csv_hold_conversations(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    quoted = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{quoted}"\n')
    for name in ("a.parquet", "a.csv"):
        found, _ = parse({"train": read_table(tmp_path / name)}, Columns(), "generation", None)
        assert found["train"] == (ROW,)


@pytest.mark.parametrize(
    ("record", "columns", "prompt"),
    [
        ({"prompt": "p"}, {}, "p"),
        ({"instruction": "add", "input": "1 2"}, {}, "add\n\n1 2"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, {}, "add\n\n1 2"),
        ({"messages": CHAT[:1]}, {}, "hi"),
        ({"messages": CHAT}, {}, "hi"),
        ({"talk": json.dumps(CHAT[:1])}, {"messages": "talk"}, "hi"),
        ({"conversations": SHARED[:2]}, {}, "system: s\nuser: hi"),
    ],
)
def test_a_row_to_answer_needs_no_answer(record: dict[str, object], columns: dict[str, str], prompt: str) -> None:
    (row,) = rows({**record, **unanswered(record, Columns(**columns))}, **columns)
    assert row.prompt == prompt


def test_the_manifest_says_the_form(tmp_path: Path) -> None:
    for name, record in {"a": {"messages": CHAT}, "b": {"instruction": "x", "output": "y"}}.items():
        (tmp_path / name).mkdir()
        lines = [{**record, "instruction": f"x{i}"} if name == "b" else record for i in range(8)]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest: Any = load_data(DataSettings(folder="."), "generation", 0, tmp_path).manifest
    assert manifest["clients"]["a"]["forms"] == {"a/train.jsonl": "messages"}
    assert manifest["clients"]["b"]["forms"] == {"b/train.jsonl": "instruction"}
    both = DataSettings(datasets=("a", "b"), partition={"name": "by_dataset"})
    manifest = load_data(both, "generation", 0, tmp_path).manifest
    assert manifest["datasets"]["b"]["forms"] == {"b/train.jsonl": "instruction"}


def test_people_read_the_last_answer_and_what_came_before() -> None:
    assert (ROW.prompt, ROW.completion) == ("hi", "yo")
    longer = ChatRow((*ROW.turns, Turn("user", "how?"), Turn("assistant", "well"), Turn("user", "bye")))
    assert longer.prompt == "user: hi\nassistant: yo\nuser: how?"
    assert longer.completion == "well"
