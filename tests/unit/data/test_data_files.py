"""Files become rows; a bad one says where and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from coterie.data.files import RowTable, read_table, table_of
from coterie.data.parse import LONGEST_TEXT, parse
from coterie.data.rows import PromptRow, Row, TextRow
from coterie.data.settings import Columns
from coterie.types import CoterieError, DataError, TaskKind

RECORDS = [{"text": "a stone, wet", "label": "old"}, {"text": 'she said "no"\nand left', "label": "new"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def rows(
    path: Path, kind: TaskKind = "classification", labels: list[str] | None = None, **columns: str
) -> tuple[tuple[Row, ...], tuple[str, ...] | None]:
    found, names = parse({"train": read_table(path)}, Columns(**columns), kind, labels)
    return found["train"], names


def test_the_three_types_hold_the_same(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", RECORDS)
    write(tmp_path / "a.csv", 'text,label\n"a stone, wet",old\n\n"she said ""no""\nand left",new\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        table = read_table(tmp_path / name)
        assert table.records == RECORDS
        assert table.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert read_table(tmp_path / "a.csv").lines == [2, 4]
    assert read_table(tmp_path / "a.parquet").where(1) == f"{tmp_path}/a.parquet, row 2"


def test_byte_order_marks_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\r\nyes,1\r\n")
    write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "yes", "label": 1}\r\n')
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "a.jsonl") == ((TextRow("yes", 0),), ("1",))


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one\u2028two", "label": 0}\n')
    assert rows(tmp_path / "a.jsonl")[0] == (TextRow("one\u2028two", 0),)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: not a line of JSON"),
        ("a.jsonl", '\n["x"]\n', "a.jsonl:2: a row is a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", "\n\n", "a.jsonl: no rows; add some$"),
        ("a.jsonl", '{"text": "x"}\n{"text": "big\\ud800"}', "a.jsonl:2: .*U.D800, half of a surrogate pair; remove"),
        ("a.csv", "text,label\n", "a.csv: no rows"),
        ("a.csv", "text,label\nx,y\nred, green,blue\n", "a.csv:3: 3 fields for 2 columns"),
        ("a.csv", 'text,label\nx,y\n"z,y\n', "a.csv:3: not a line of CSV"),
        ("a.parquet", "text", "a.parquet: not a Parquet file that can be read: .*; write it again$"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl:1: not a line of JSON: its brackets are nested too deep"),
        ("a.jsonl", '{"label": ' + "1" * 4301 + "}", "a.jsonl:1: not a line of JSON: it has a number with thousands"),
        ("a.xlsx", "text", "a.xlsx: unknown file type; the types are .jsonl, .csv, .parquet"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(CoterieError, match=says):
        read_table(write(tmp_path / name, content))


def parquet(path: Path, **columns: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_file_with_a_damaged_footer(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=pyarrow.array(["x", "y"]))
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    content[-8 - size : -8] = b"\xff" * size
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file that can be read: .+; write it again$"):
        read_table(path)


def test_a_parquet_file_with_text_that_is_not_utf_8(tmp_path: Path) -> None:
    wrong = pyarrow.array([b"x", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(DataError, match=r"a\.parquet: a text in it is not UTF-8: b'caf\\xe9'; write"):
        read_table(parquet(tmp_path / "a.parquet", text=wrong))


def test_a_parquet_file_with_a_time_out_of_range(tmp_path: Path) -> None:
    when = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file that can be read: .+; write it again$"):
        read_table(parquet(tmp_path / "a.parquet", text=pyarrow.array(["x"]), when=when))


def test_only_a_file_that_may_be_missing_can_be_left_out(tmp_path: Path) -> None:
    for split in ("validation", "test"):
        with pytest.raises(CoterieError, match=r"no rows; add some, or leave the file out$"):
            read_table(write(tmp_path / "a.jsonl", "\n"), split)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"gone\.csv: no such file"):
        read_table(tmp_path / "gone.csv")


def test_half_of_a_character_in_a_table_without_a_file_is_named() -> None:
    with pytest.raises(DataError, match=r"^made up, row 2: a text in it has the character U\+DC00"):
        table_of("made up", [{"text": "a"}, {"text": "b\udc00"}])


def test_tables_without_a_file_have_a_hash_of_their_content() -> None:
    one, same, other = (table_of("made up", [{"text": text}]) for text in ("a", "a", "b"))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.where(0) == "made up, row 1"


@pytest.mark.parametrize(
    ("values", "labels", "indices", "names"),
    [
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        ([10, 9, 10], None, [1, 0, 1], ("9", "10")),  # as numbers, not as text
        (["10", "9"], None, [1, 0], ("9", "10")),
        ([True, False], None, [1, 0], ("false", "true")),
        ([2.0, 1.0], None, [1, 0], ("1", "2")),
        (["b", "a"], ["b", "a", "c"], [0, 1], ("b", "a", "c")),
        ([2, 0], ["b", "a", "c"], [2, 0], ("b", "a", "c")),  # an index into the names
        (["2", "0"], ["b", "a", "c"], [2, 0], ("b", "a", "c")),
        ([2, 1], ["1", "2", "3"], [1, 0], ("1", "2", "3")),  # the names are numbers: no index
    ],
)
def test_labels(values: list[Any], labels: list[str] | None, indices: list[int], names: tuple[str, ...]) -> None:
    table = table_of("t", [{"text": "x", "label": value} for value in values])
    found, space = parse({"train": table}, Columns(), "classification", labels)
    assert [row.label for row in found["train"] if isinstance(row, TextRow)] == indices
    assert space == names


def test_a_label_that_no_training_row_has_is_refused_unless_all_are_listed() -> None:
    tables = {
        split: table_of(split, [{"text": "x", "label": label}]) for split, label in (("train", "b"), ("test", "a"))
    }
    with pytest.raises(CoterieError, match=r"^test, row 1: no training row has the label 'a', only b\. Correct"):
        parse(tables, Columns(), "classification", None)
    found, names = parse(tables, Columns(), "classification", ["a", "b"])
    assert names == ("a", "b")
    assert found == {"train": (TextRow("x", 1),), "test": (TextRow("x", 0),)}


def test_column_names_can_be_chosen(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"s1": "a", "s2": "b", "y": "no", "in": "p", "out": "c"}])
    assert rows(path, text="s1", text_pair="s2", label="y")[0] == (TextRow("a", 0, "b"),)
    assert rows(path, text="s1", label="y")[0] == (TextRow("a", 0),)
    assert rows(path, kind="generation", prompt="in", completion="out") == ((PromptRow("p", "c"),), None)


def test_a_column_text_pair_is_taken_where_there_is_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "text_pair": "b", "label": 0}])
    assert rows(path)[0] == (TextRow("a", 0, "b"),)
    empty = write(tmp_path / "a.csv", "text,text_pair,label\na,,0\n")
    assert rows(empty)[0] == (TextRow("a", 0),)


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        ([{"text": "a", "label": "x"}, {"text": "a"}], {}, "a.jsonl:2: the row has no label"),
        ([{"text": "a", "label": "x"}, {"text": "a", "label": " "}], {}, "a.jsonl:2: the row has no label"),
        ([{"text": "a", "label": "x"}, {"text": None, "label": "x"}], {}, "a.jsonl:2: the row has no text"),
        (
            [{"text": "a", "label": 0, "text_pair": "b"}, {"text": "a", "label": 0}],
            {},
            "a.jsonl:2: the row has no text_pair",
        ),
        ([{"text": 3, "label": "x"}], {}, "a.jsonl:1: text is 3, not text"),
        ([{"text": "a", "label": 0.5}], {}, "a.jsonl:1: the label 0.5 is neither"),
        ([{"text": "a", "label": "x"}], {"labels": ["y", "z"]}, "a.jsonl:1: the label 'x' is not one of y, z"),
        ([{"text": "a", "label": 2}], {"labels": ["y", "z"]}, "a.jsonl:1: the label '2' is not one of y, z"),
        ([{"text": "a", "label": -1}], {"labels": ["y", "z"]}, "a.jsonl:1: the label '-1' is not one of y, z"),
        ([{"text": "a", "label": 0}], {"labels": ["1", "2"]}, "a.jsonl:1: the label '0' is not one of 1, 2"),
        ([{"text": "a", "label": 0}], {"labels": ["1", "1"]}, "listed twice"),
        ([{"body": "a", "label": "x"}], {}, "no column 'text'; its columns are body, label. Set data.columns.text"),
        ([{"text": "a", "label": "x"}], {"text_pair": "b"}, "no column 'b'; its columns are text, label"),
        ([{"text": "a", "label": "x"}], {"kind": "generation"}, "no column 'prompt'"),
        ([{"prompt": "a", "completion": ""}], {"kind": "generation"}, "a.jsonl:1: the row has no completion"),
    ],
)
def test_a_bad_row_says_where(
    tmp_path: Path, records: list[dict[str, Any]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(CoterieError, match=says):
        rows(jsonl(tmp_path / "a.jsonl", records), **options)


def test_many_labels_are_not_all_listed() -> None:
    table = RowTable("t", [{"text": "a", "label": "x"}], "")
    with pytest.raises(CoterieError, match=r"label 10, label 11, \.\.\. \(150 in all\)"):
        parse({"train": table}, Columns(), "classification", [f"label {i}" for i in range(150)])


# rows that look right and are not -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("no", "NO"), ("not sure", "not  sure"), ("big", "\uff42\uff49\uff47")])
def test_labels_that_differ_in_their_spelling_alone_are_refused_unless_listed(
    one: str, other: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"{i}", "label": [one, "yes", other][i % 3]} for i in range(6)])
    with pytest.raises(DataError, match=r"a\.jsonl:\d: the label '.*' differs from '.*' only in .*data\.labels"):
        rows(path)
    assert rows(path, labels=[one, "yes", other])[1] == (one, "yes", other)


@pytest.mark.parametrize("kind", ["classification", "generation", "multiple_choice"])
def test_a_text_without_end_is_refused_wherever_it_stands(kind: TaskKind, tmp_path: Path) -> None:
    good: dict[str, Any] = {"text": "a", "text_pair": "b", "label": 0, "prompt": "a", "completion": "b"}
    good |= {"choices": ["x", "y"]} if kind == "multiple_choice" else {}
    columns = {
        "classification": ["text", "text_pair"],
        "generation": ["prompt", "completion"],
        "multiple_choice": ["prompt", "choices"],
    }[kind]
    rows(jsonl(tmp_path / "a.jsonl", [good, good]), kind)
    for column in columns:
        text: Any = "x" * (LONGEST_TEXT + 1)
        long = {**good, column: ["y", text] if column == "choices" else text}
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {column}.* has 1,000,001 characters"):
            rows(jsonl(tmp_path / "a.jsonl", [good, long]), kind)
    if kind != "classification":
        with pytest.raises(DataError, match=r"a\.jsonl:2: text has 1,000,001 characters"):
            rows(jsonl(tmp_path / "a.jsonl", [good, {**good, "text": text}]), kind, template="{text}?")
