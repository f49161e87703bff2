"""Damaged JSON is one kind of error, and names that a terminal would obey are found."""

from __future__ import annotations

import json

import pytest

from coterie.text import name_fault, parse_json, printable


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ', r"line 1, column 7"),
        ("[" * 100_000, "nested too deep"),
        ("1" * 4301, "thousands of digits"),
        ('"big\\ud800"', r"U\+D800, half of a surrogate pair"),
        ('{"\\udfff": 1}', r"U\+DFFF"),
        ('["\\uDBFF\\uD800"]', r"U\+DBFF"),
        (b'"\xff"', "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),
        ('"\ud800"', r"U\+D800"),
        ('"a"'.encode("utf-16"), "utf-8"),
        ('"a"'.encode("utf-16-le"), "Invalid control character"),
    ],
)
def test_bad_json_is_a_value_error_that_says_why(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


@pytest.mark.parametrize("value", ["👍🏽", "\\ud800", 'a "quote"', {"é": [1, None, "\u202e"]}])
def test_good_json_is_its_value(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == parse_json(text.encode("utf-8-sig")) == value


@pytest.mark.parametrize("name", ["yes", "Ça va?", "שלום", "日本", "👩‍💻", "a b", "-1", ""])
def test_a_name_that_is_shown(name: str) -> None:
    assert name_fault(name) is None
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "code", "shown"),
    [
        ("yes\x1b[31m", "001B", "yes\\x1b[31m"),
        ("a\u202eb", "202E", "a\\u202eb"),
        ("a\u2067", "2067", "a\\u2067"),
        ("a\x00", "0000", "a\\x00"),
        ("a\x9b", "009B", "a\\x9b"),
        ("big\ud800", "D800", "big\\ud800"),
        ("a\u2028b", "2028", "a\\u2028b"),
    ],
)
def test_a_name_that_is_not_shown(name: str, code: str, shown: str) -> None:
    assert name_fault(name) == f"'{shown}' has the character U+{code}, which is not shown"
    assert printable(name) == shown


def test_what_a_name_may_have_is_allowed() -> None:
    assert name_fault("a\nb") is not None
    assert name_fault("a\nb\t", "\n\t") is None
    assert printable("a\nb") == "a\nb"
