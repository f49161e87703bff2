"""``coterie pool show`` on a terminal of 80 columns: what it prints stays whole."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import pools
import tiny
from coterie.adapters.pool import Pool, norms, total, write_pool
from coterie.cli import console
from coterie.cli.pool import show

LONG = "sentiment-of-film-reviews-in-eleven-languages-and-two-dialects-of-one-of-them-v2.1"
SOURCE = "/srv/a folder with spaces/of-some-depth/below/another/folder/that/has/a/long/name/adapters"
BASE = "organisation-with-a-long-name/a-model-whose-name-is-no-shorter-than-that-of-its-organisation"


def made() -> Pool:
    pool = pools.made(tiny.targets(tiny.model("bert", "classification")), {LONG: 8, "two": 1, "three": 200})
    more = {"base": BASE, "licence": "cc-by-nc-sa-4.0", "left_out": ("classifier.dense", "classifier.out_proj")}
    adapters = [replace(a, source=f"{SOURCE}/{a.name}", sha256=f"{a.first:064x}"[::-1], **more) for a in pool.adapters]
    return pools.stronger(replace(pool, base=BASE, adapters=tuple(adapters)), "three", 2.0)


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    screen = StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, width=width, emoji=False))
    show(folder)
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 40])
def test_no_name_and_no_number_is_cut_or_wrapped(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made()
    write_pool(tmp_path, pool)
    lines = shown(tmp_path, monkeypatch, width)
    of_pool = norms(pool)
    for number, adapter in enumerate(pool.adapters):
        low, high = adapter.experts[0], adapter.experts[-1]
        experts = f"{low}-{high}" if high > low else str(low)
        row = [adapter.name, str(adapter.rank), experts, f"{total(of_pool[adapter.name]):.3g}", str(len(adapter.ranks))]
        assert lines[1 + number].split() == row
        start = lines.index(adapter.name)
        assert lines[start + 1 : start + 6] == [
            "  licence   cc-by-nc-sa-4.0",
            f"  base      {BASE}",
            f"  source    {SOURCE}/{adapter.name}",
            f"  sha256    {adapter.sha256[:12]}",
            "  left out  classifier.dense, classifier.out_proj",
        ]
    assert {f"pool {pool.name}", f"base {BASE}"} <= set(lines)
    note = next(number for number, line in enumerate(lines) if line.startswith("note: three is out of line"))
    assert all(len(line) <= width for line in lines[note:])
    text = " ".join(lines[note:])
    assert text.startswith("note: three is out of line: its norm (of B A, over its matrices) is ")
    assert "median. By default a run leaves it out ([method] pool_bound): " in text
    assert text.endswith("check where it comes from, or build the pool without it")


def test_what_others_wrote_stays_on_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.made(tiny.targets(tiny.model("bert", "classification")), {"one\nnote: all is well": 3})
    adapters = [replace(adapter, licence="mit\x1b[2J\n  sha256    [b]") for adapter in pool.adapters]
    write_pool(tmp_path, replace(pool, adapters=tuple(adapters)))
    lines = shown(tmp_path, monkeypatch, 80)
    assert lines[1].split()[:4] == ["one\\nnote:", "all", "is", "well"]
    assert "  licence   mit\\x1b[2J\\n  sha256    [b]" in lines


def test_short_names_fit_on_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path, pools.made(tiny.targets(tiny.model("bert", "classification")), {"one": 3, "two": 12}))
    lines = shown(tmp_path, monkeypatch, 80)
    assert max(map(len, lines)) <= 80
    header, one, two = lines[:3]
    assert header.split() == ["adapter", "rank", "experts", "norm", "matrices"]
    assert len(header) == len(one) == len(two), "the columns are aligned"
    assert "left out" not in "\n".join(lines)
