"""Rows from files as people write them, the bad ones named and the others whole."""

from __future__ import annotations

import io
import json

import pytest

from coterie.inference.records import Located, as_json_line, csv_records
from coterie.types import DataError


def read(text: str | bytes) -> list[dict[str, object] | str]:
    """The rows, and the reasons for those that there are not."""
    content = text.encode() if isinstance(text, str) else text
    return [
        dict(row.record) if isinstance(row, Located) else row.reason for row in csv_records(io.BytesIO(content), "f")
    ]


def test_no_piece_of_a_bad_row_counts_as_a_row() -> None:
    bad, good = read('text,id\n"bad"x,"first\nsecond line"\n"fine, too",2\n')
    assert "f:2: not a line of CSV" in str(bad)
    assert good == {"text": "fine, too", "id": "2"}
    unclosed = read('text,id\n"never closed,1\nb,2\nc,3\n')
    assert len(unclosed) == 1
    assert "f:2" in str(unclosed[0])


def test_a_long_field_is_a_field() -> None:
    long = "word " * 60_000
    assert read(f'text,id\n"{long}",1\nb,2\n') == [{"text": long, "id": "1"}, {"text": "b", "id": "2"}]


def test_bytes_that_are_not_utf_8_are_not_taken_for_a_character_that_is() -> None:
    rows = read("text\nodd \ufffd but right\n".encode() + b"odd \xff\n")
    assert rows == [{"text": "odd \ufffd but right"}, "f:3: not UTF-8"]


def test_a_short_row_lacks_its_last_fields() -> None:
    assert read("text,note\nhello\nthere,full\n") == [
        {"text": "hello", "note": None},
        {"text": "there", "note": "full"},
    ]


def test_a_column_has_a_name_of_its_own() -> None:
    with pytest.raises(DataError, match="f:1: two columns are called 'text'; rename one"):
        read("text,id,text\na,1,b\n")


def test_the_first_line_may_begin_with_a_mark_and_lines_may_end_in_two_characters() -> None:
    assert read("\ufefftext,id\r\na,1\r\n") == [{"text": "a", "id": "1"}]


def test_what_json_lacks_is_written_as_something_that_it_has() -> None:
    line = as_json_line({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": b"\x00\xff"}, "e": "é"})
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": None, "b": [None, 1.5], "c": {"d": "AP8="}, "e": "é"}
