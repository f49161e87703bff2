"""Parquet files are read in parts, however they are stored, and within a bound on the memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from coterie.data import parquet
from coterie.data.files import read_table
from coterie.data.parquet_footer import chunks_of
from coterie.inference.records import Located, read_records
from coterie.types import DataError


def repeated(path: Path, text: str, times: int, in_lists: int = 0) -> Path:
    """A file of ``times`` rows with the same text, which it stores once; or of rows with so many ``in_lists``."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, "int32"), pyarrow.array([text]))
    if in_lists:
        texts = pyarrow.ListArray.from_arrays(pyarrow.array(range(0, times + 1, in_lists), "int32"), texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, store_schema=False)
    return path


def most_memory(*, anew: bool = False) -> int:
    """The most memory of this process in bytes, since the last call that counts ``anew``."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can count a process's most memory anew")
def test_the_most_memory_is_counted_anew() -> None:
    for size in (2**27, 2**26):
        before = most_memory(anew=True)
        assert len(b"a" * size) == size
        assert size / 2 < most_memory() - before < size * 1.5


@pytest.mark.parametrize(("times", "in_lists"), [(30_000, 0), (30_000, 100), (30_000, 30_000), (2_000_000, 0)])
def test_a_small_parquet_file_that_takes_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, in_lists: int
) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**26)
    path = repeated(tmp_path / "a.parquet", "a" * (10 if times > 10**6 else 10**5), times, in_lists)
    assert path.stat().st_size < 2**17
    before = most_memory(anew=True) if sys.platform == "linux" else 0
    with pytest.raises(
        DataError, match=r"a\.parquet: its rows take more than 64.0 MiB of memory, .*; write fewer rows"
    ):
        read_table(path)
    if in_lists or times < 10**6:
        with pytest.raises(DataError, match=r"its rows that are read at a time take more than 64.0 MiB .* smaller row"):
            list(read_records(path))
    if sys.platform == "linux":
        assert most_memory() - before < 2**27


def test_a_file_that_is_read_in_parts_may_take_more_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**20)
    path = repeated(tmp_path / "a.parquet", "a" * 100, 10_000)
    with pytest.raises(DataError, match=r"its rows take more than 1.0 MiB"):
        read_table(path)
    records = [read.record for read in read_records(path) if isinstance(read, Located)]
    assert records == [{"text": "a" * 100}] * 10_000


def test_half_a_million_rows_of_a_word_and_a_label_are_within_the_bound(tmp_path: Path) -> None:
    path = repeated(tmp_path / "a.parquet", "a", 500_000)
    table = pyarrow.parquet.read_table(path, read_dictionary=["text"])
    pyarrow.parquet.write_table(table.append_column("label", table["text"]), path)
    assert len(next(parquet.parquet_records(path))) > 0


def test_one_text_that_is_larger_unpacked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**20)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 2**19]}), tmp_path / "a.parquet", compression="zstd")
    for read in (read_table, lambda path: list(read_records(path))):
        with pytest.raises(DataError, match=r"a\.parquet: the columns of a row group take more than 256 KiB"):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("lists", [False, True])
def test_texts_that_repeat_the_start_of_others_are_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: bool
) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**25)
    texts = ["a" * 100_000 + str(i) for i in range(400)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [texts] if lists else texts}),
        tmp_path / "a.parquet",
        use_dictionary=False,
        column_encoding={"text.list.element" if lists else "text": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(
        DataError, match="group take more than 8.0 MiB" if lists else "its rows take more than 32.0 MiB"
    ):
        read_table(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "stored",
    [
        {"row_group_size": 700},
        {"dictionary_pagesize_limit": 50},  # some of a column's texts in a list of the different ones, others not
        {"use_dictionary": False, "compression": "zstd", "store_schema": False},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "label": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
)
def test_a_parquet_file_is_read_in_parts_however_it_is_stored(tmp_path: Path, stored: dict[str, Any]) -> None:
    records = [
        {
            "text": f"row {i}",
            "label": None if i % 3 else "yes",
            "messages": [{"role": "user", "content": f"{i} or {i % 7}"}, {"role": "assistant", "content": "yes"}],
            "tags": [(f"{i % 5}", "x")],
            "score": i / 2,
            "image": b"\x00" * (i % 9),
        }
        for i in range(2500)
    ]
    kind = pyarrow.Table.from_pylist(records[:1]).schema
    kind = kind.set(3, pyarrow.field("tags", pyarrow.map_(pyarrow.string(), pyarrow.string())))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, kind), tmp_path / "a.parquet", **stored)
    assert read_table(tmp_path / "a.parquet").records == records


@pytest.mark.parametrize("before", [0, 2])
def test_what_arrow_cannot_read_on_as_places_in_a_list_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """It fails so, or failed, for lists of texts of which some are in such a list and others not."""
    whole = pyarrow.parquet.ParquetFile

    class Failing(whole):  # type: ignore[misc, valid-type]
        def __init__(self, source: Any, read_dictionary: Any = None, **of: Any) -> None:
            super().__init__(source, read_dictionary=read_dictionary, **of)
            self.fails = bool(read_dictionary)

        def iter_batches(self, *of: Any, **more: Any) -> Iterator[Any]:
            for number, batch in enumerate(super().iter_batches(*of, **more)):
                if self.fails and number == before:
                    raise pyarrow.ArrowNotImplementedError("lists of different kinds")
                sizes.append(0 if self.fails else batch.num_rows)
                yield batch

    sizes: list[int] = []
    records = [{"text": [f"{i}"] * (i % 3), "other": str(i)} for i in range(6000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3000)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "flat.parquet")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Failing)
    monkeypatch.setattr(parquet, "LEAST", 2**12)
    assert read_table(path).records == records
    stored = pyarrow.parquet.read_metadata(path).row_group(0).total_byte_size  # as each row may be long
    assert max(sizes) == parquet.RATIO * path.stat().st_size // stored > 1
    if not before:
        with pytest.raises(DataError, match="lists of different kinds"):
            read_table(tmp_path / "flat.parquet")


@pytest.mark.parametrize(
    ("column", "refused"),
    [
        (pyarrow.array([1] * 5000), (True, False)),
        (pyarrow.array([[1] * 50_000]), (True, True)),  # a list may have any number of values
        (pyarrow.array([b"a" * 1024] * 5000, pyarrow.binary(1024)), (True, True)),
    ],
)
def test_what_a_file_says_of_itself_is_enough_to_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: Any, refused: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**20)
    monkeypatch.setattr(parquet, "_batches", lambda *of: iter(()))  # no row is read
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    for whole, of in zip((True, False), refused, strict=True):
        with pytest.raises(DataError, match=r"its rows .*take more than 1\.0 MiB") if of else nullcontext():
            list(parquet.parquet_records(tmp_path / "a.parquet", whole=whole))


def test_texts_that_arrow_reads_in_full_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**20)
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        parquet,
        "_batches",
        lambda _, __, ___, chunks, rows, most: iter(seen.append((chunks[0].size, rows, most)) or ()),
    )
    table = pyarrow.table({"text": [f"{i:04}" + "a" * i for i in range(200)]})
    stored: dict[str, Any] = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", **stored)
    list(parquet.parquet_records(tmp_path / "a.parquet", whole=False))
    ((size, rows, most),) = seen
    assert 1 < rows == most // size < parquet.ROWS


def test_flat_rows_of_every_row_group_come_once_and_from_the_content_that_is_given(tmp_path: Path) -> None:
    records = [{"text": f"{i}"} for i in range(250)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=100)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").unlink()  # what is read is what was hashed, whatever becomes of the file
    assert [row for part in parquet.parquet_records(tmp_path / "a.parquet", content) for row in part] == records


def test_a_larger_file_may_take_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LEAST", 2**10)
    with pytest.raises(
        DataError, match=r"its rows take more than \d.* KiB of memory, 64 times .*write the rows as JSONL"
    ):
        read_table(repeated(tmp_path / "a.parquet", "a" * 1000, 1000))
    records = [{"text": hashlib.sha256(str(row).encode()).hexdigest() * 16} for row in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", compression="zstd")
    assert read_table(tmp_path / "a.parquet").records == records


def test_a_damaged_name_of_a_column_is_no_crash(tmp_path: Path) -> None:
    path = repeated(tmp_path / "a.parquet", "a", 3)
    whole = path.read_bytes()
    places = [at for at in range(len(whole)) if whole.startswith(b"text", at)]
    accepted = 0
    for at in places:
        path.write_bytes(whole[:at] + b"tess" + whole[at + 4 :])
        try:
            read = read_table(path)
        except DataError:
            continue
        assert len(read.records) == 3
        accepted += 1
    assert len(places) > 1
    assert accepted > 0


@pytest.mark.parametrize("stored", [{}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}])
def test_the_footer_says_what_pyarrow_says(tmp_path: Path, stored: dict[str, Any]) -> None:
    names = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 7: "DELTA_BYTE_ARRAY", 8: "RLE_DICTIONARY"}
    table = pyarrow.table({f"text {i}": [f"{row % 9} {i}" for row in range(500)] for i in range(20)})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=200, **stored)
    with path.open("rb") as file:
        groups = chunks_of(file)
    footer = pyarrow.parquet.read_metadata(path)
    assert (len(groups), {len(group) for group in groups}) == (3, {20})
    for number, group in enumerate(groups):
        for at, chunk in enumerate(group):
            column = footer.row_group(number).column(at)
            assert (chunk.values, chunk.size) == (column.num_values, column.total_uncompressed_size)
            assert {names[each] for each in chunk.encodings} == {*column.encodings}
            assert chunk.delta == bool(stored)
            assert chunk.repeats


def test_no_damage_to_a_footer_ends_the_process(tmp_path: Path) -> None:
    """pyarrow's own view of a column does where a histogram of sizes is damaged."""
    path = repeated(tmp_path / "a.parquet", "a", 3)
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for at in range(len(whole) - 8 - size, len(whole) - 8):
        for other in (whole[at] ^ 1, whole[at] ^ 0x10, 0x15):
            path.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
            try:
                read_table(path)
            except DataError:
                refused += 1
    assert refused > 100


def test_a_text_with_one_wide_character_counts_four_bytes_for_each() -> None:
    plain, wide = (
        parquet._bytes(pyarrow.array([text]).dictionary_encode()) for text in ("a" * 1000, "a" * 999 + "\U0001f600")
    )
    assert wide == plain + 3000
