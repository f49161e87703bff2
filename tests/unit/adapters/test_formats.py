"""Bundles of every format that was ever written keep loading, and docs/formats.md says what is in one."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import coterie
import stored_bundle
from coterie.adapters.about import ABOUT_FILE, About, Texts, read_about
from coterie.adapters.bundle import ADAPTER_FOLDER, BUNDLE_FILE, Bundle, read_bundle, write_bundle
from coterie.adapters.write import CONFIG_FILE, WEIGHTS_FILE
from coterie.codec import encode
from coterie.nn.gates import gates
from coterie.types import Bank, CoterieError, GateSpec, Key, Part

PAGE = Path(__file__).parents[3] / "docs" / "formats.md"
FORMATS = sorted(path.name for path in stored_bundle.STORED.iterdir())
EXPECTED = [[0.0386, -0.328, -0.0218], [0.0398, -0.3314, -0.0164], [0.0587, -0.3545, 0.0099]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("number", FORMATS)
def test_a_bundle_that_was_stored_long_ago_loads(number: str, tmp_path: Path) -> None:
    base = stored_bundle.base(tmp_path / "base")
    north = coterie.load(stored_bundle.STORED / number, base=str(base))
    assert (north.client, north.labels, north.method, north.round) == ("north", stored_bundle.LABELS, "fedlease", 7)
    assert north.max_length == 24
    with torch.no_grad():
        out = north.model(**north.tokenizer(list(stored_bundle.TEXTS), return_tensors="pt", padding=True)).logits
    assert out.tolist() == [pytest.approx(row, abs=2e-3) for row in EXPECTED]


def test_the_present_format_is_stored(tmp_path: Path) -> None:
    stored = stored_bundle.STORED / str(Bundle.format)
    bank, about = read_bundle(stored)
    write_bundle(tmp_path, bank, about)
    assert (tmp_path / BUNDLE_FILE).read_bytes() == (stored / BUNDLE_FILE).read_bytes(), "the format changed"
    assert about.base_sha256 == stored_bundle.about(stored_bundle.base(tmp_path / "base")).base_sha256 != ""
    assert about.texts == stored_bundle.TREATED
    made = stored_bundle.bank()
    assert (bank.gate, bank.scaling, bank.dropout) == (made.gate, made.scaling, made.dropout)
    assert bank.tensors.keys() == made.tensors.keys()
    assert all(torch.allclose(bank.tensors[key], value) for key, value in made.tensors.items())


def test_a_bundle_of_a_format_to_come_says_what_to_do(tmp_path: Path) -> None:
    bank, about = read_bundle(stored_bundle.STORED / FORMATS[-1])
    (tmp_path / BUNDLE_FILE).write_bytes(encode(Bundle(bank, about, 99)))
    with pytest.raises(CoterieError, match=r"has format 99, and this Coterie reads up to 4; install a newer one"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("number", [{"a": 1}, [4], "4", None])
def test_a_bundle_whose_format_is_no_number_is_refused(number: object, tmp_path: Path) -> None:
    (tmp_path / BUNDLE_FILE).write_bytes(encode({"format": number}))
    with pytest.raises(CoterieError, match=rf"has format {re.escape(str(number))}, and this Coterie reads up to 4"):
        read_bundle(tmp_path)


# the page -------------------------------------------------------------------------------------------------------------


def rows(title: str) -> list[str]:
    """The first cell of every row of the table under a heading, without its backticks."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return [re.sub(r"`", "", row) for row in re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)]


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def header() -> Mapping[str, object]:
    blob = (stored_bundle.STORED / str(Bundle.format) / BUNDLE_FILE).read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    found: Mapping[str, object] = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["coterie"][8:])
    return found


def test_the_page_has_every_field_of_a_bundle() -> None:
    assert rows("A bundle") == fields(Bundle)
    assert rows("The bank") == fields(Bank)
    assert rows("The gate") == fields(GateSpec)
    assert rows("What is said of it") == fields(About)
    tree = header()
    assert list(tree) == fields(Bundle)
    assert list(tree["bank"]) == fields(Bank)  # type: ignore[call-overload]
    assert list(tree["about"]) == fields(About)  # type: ignore[call-overload]
    assert rows("Texts") == fields(Texts) == list(tree["about"]["texts"])  # type: ignore[call-overload,index]


def test_the_page_has_every_gate_and_every_part() -> None:
    assert sorted(rows("Gates")) == sorted(gates())
    assert rows("Names of tensors") == [str(Key("M", number, part)) for number, part in NAMED]


NAMED = [(0, Part.A), (0, Part.B), (-2, Part.A), (-3, Part.A), (-1, Part.ROUTER), (-1, Part.HEAD)]


def test_the_page_has_every_file_of_an_adapter(tmp_path: Path) -> None:
    bank, about = read_bundle(stored_bundle.STORED / str(Bundle.format))
    one = {key: value for key, value in bank.tensors.items() if key.expert == 0}
    write_bundle(tmp_path, Bank(one, scaling=2.0), replace(about, task="generation", labels=None))
    written = {path.name for path in (tmp_path / ADAPTER_FOLDER).iterdir()}
    assert written == {CONFIG_FILE, WEIGHTS_FILE, ABOUT_FILE} == set(rows("An adapter"))
    assert read_about(tmp_path / ADAPTER_FOLDER) == replace(about, task="generation", labels=None)
    config = json.loads((tmp_path / ADAPTER_FOLDER / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 1, 2.0)
