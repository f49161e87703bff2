"""Every block of docs/llm.md is what it says: configs are valid, rows are conversations, commands exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.config.load import check_config
from coterie.data.files import RowTable
from coterie.data.parse import parse
from coterie.data.rows import ChatRow
from coterie.data.settings import Columns

TEXT = (Path(__file__).parents[3] / "docs" / "llm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_block_is_valid() -> None:
    assert sorted(kind for kind, _ in BLOCKS) == ["json", "sh", "text", "toml", "toml", "toml"]
    for kind, block in BLOCKS:
        if kind == "toml":
            assert check_config(tomllib.loads(block)).task.kind == "generation"
        if kind == "json":
            table = RowTable("rows.jsonl", [json.loads(block)], "")
            (row,) = parse({"train": table}, Columns(), "generation", None)[0]["train"]
            assert isinstance(row, ChatRow)
        if kind == "sh":
            _check_commands(block)


def _check_commands(block: str) -> None:
    for line in block.splitlines():
        command = line.partition("#")[0]
        done = CliRunner().invoke(app, [command.split()[1], "--help"])
        assert done.exit_code == 0
        assert all(flag in done.output for flag in re.findall(r"--\w+", command))
