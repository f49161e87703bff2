"""The commands that serve models."""

from __future__ import annotations

import hashlib
import io
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from api_runs import make_run
from coterie.cli import api as commands
from coterie.cli import console
from coterie.cli.main import app
from coterie.types import CoterieError


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=out, width=200))
    return out


def test_a_key_is_shown_with_an_entry_that_opens_what_it_says(said: io.StringIO) -> None:
    assert CliRunner().invoke(app, ["api-key", "ops", "--clients", "north, south"]).exit_code == 0
    first, *_, entry = said.getvalue().split("\n\n")
    (read,) = tomllib.loads(entry)["keys"]
    key = first.removeprefix("key for ops: ")
    assert read == {"name": "ops", "sha256": hashlib.sha256(key.encode()).hexdigest(), "clients": ["north", "south"]}


def test_the_service_says_where_it_is(said: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.api.server.Ready.run", lambda self: None)
    result = CliRunner().invoke(app, ["api", str(make_run(tmp_path)), "--clients", "south,north", "--port", "0"])
    assert result.exit_code == 0, result.exception
    assert "models: south, north" in said.getvalue()
    assert "open http://127.0.0.1:" in said.getvalue()


@pytest.mark.parametrize("clients", [",", "", " , "])
@pytest.mark.parametrize("command", ["api", "api-key"])
def test_clients_that_name_nobody_are_an_error_rather_than_all(
    command: str, clients: str, said: io.StringIO, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [command, str(tmp_path), "--clients", clients])
    assert isinstance(result.exception, CoterieError)
    assert "--clients names no client" in str(result.exception)
    assert said.getvalue() == ""


def test_an_unknown_precision_is_an_error(said: io.StringIO, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["api", str(tmp_path), "--precision", "float16"])
    assert "--precision is float32 or bfloat16, not 'float16'" in str(result.exception)
    assert said.getvalue() == ""


def test_without_fastapi_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoterieError, match=r"needs fastapi and uvicorn: pip install 'coterie\[api\]'"):
        commands._check_installed()


def test_a_server_needs_a_config_with_its_sites(tmp_path: Path) -> None:
    (tmp_path / "triage.toml").write_text('[model]\npath = "m"\n[data]\nfolder = "clients"\n[method]\nname = "fedit"\n')
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "triage.toml")])
    assert isinstance(result.exception, CoterieError)
    assert "has no [federation]: it is for a simulation (`coterie run`); add it, with sites" in str(result.exception)


def test_the_help_says_what_an_argument_is() -> None:
    assert "TOML file with [federation]" in CliRunner().invoke(app, ["serve", "--help"]).output
