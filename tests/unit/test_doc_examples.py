"""Examples on the pages that are no command and no config: rows, events, and a client's half of a method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

import short_runs
from coterie.data.files import read_table
from coterie.data.parse import parse
from coterie.data.settings import Columns
from coterie.runs.events import Evaluated, RoundDone, from_json
from doc_blocks import ROOT, Block, blocks

EVENTS = ROOT / "docs" / "run-folder.md"


def documents(text: str) -> Iterator[dict[str, Any]]:
    """The JSON documents that ``text`` holds, one after the other."""
    at, decoder = 0, json.JSONDecoder()
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        yield value


def rows() -> list[Block]:
    found = [block for block in blocks("json") if block.page != EVENTS]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("block", rows(), ids=str)
def test_rows_on_a_page_are_rows(block: Block, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(block.text, encoding="utf-8")
    given = list(documents(block.text))
    kind: Any = "multiple_choice" if "choices" in given[0] else "generation"
    read, _ = parse({"train": read_table(tmp_path / "train.jsonl")}, Columns(), kind, None)
    assert len(read["train"]) == len(given) >= 1


def test_events_on_the_page_of_the_run_folder_are_those_of_a_run() -> None:
    (block,) = [block for block in blocks("json") if block.page == EVENTS]
    assert [type(from_json(document)) for document in documents(block.text)] == [RoundDone, Evaluated]


def test_the_clients_half_of_the_architecture_page_runs(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (block,) = blocks("python", "client")
    page: dict[str, Any] = {}
    exec(block.text, page)
    method = short_runs.make("fedit", rounds=1)
    object.__setattr__(method, "client", MethodType(page["client"], method))  # the method is frozen
    run = short_runs.run(method, short_runs.clients("mood-0", "size-0"), tmp_path, rounds=1)
    assert {name for reply in run.replies.values() for name in reply.info} == {"before"}
    assert all(key in run.state.lora for reply in run.replies.values() for key in reply.tensors if key.expert >= 0)
