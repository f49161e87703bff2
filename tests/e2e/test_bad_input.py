"""Bad input gives one clear error, exit code 2, and loses nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sites
from coterie.cli import main as cli
from coterie.config.load import check_config, load_config, override
from coterie.experiment import run
from coterie.runs.events import CheckpointSaved, Event, Resumed
from coterie.types import CoterieError

EDITS = {  # what is wrong: (the edit of the config, what the error says)
    "unknown key": (("learning_rate", "learning_rat"), r"\[train\].*'learning_rat'; did you mean 'learning_rate'\?"),
    "unknown method key": (("warmup_rounds", "warm_rounds"), r"\[method\].*did you mean 'warmup_rounds'\?"),
    "unknown section": (("[lora]", "[loro]"), r"unknown key 'loro'; did you mean 'lora'\?"),
    "wrong type": (("epochs = 1", 'epochs = "many"'), r"\[train\] epochs: .*valid integer.*'many'"),
    "rank 0": (("rank = 2", "rank = 0"), r"\[lora\] rank: .*greater than or equal to 1.*found 0"),
    "rank above the width": (("rank = 2", "rank = 33"), r"rank 33 .* Linear of 32 to 32; .* 32 or less"),
    "a rank that would never end": (("rank = 2", "rank = 100000"), r"rank 100000 .* 32 or less"),
    "unknown method": (('"fedlease"', '"fedleaze"'), r"unknown method 'fedleaze'.*fedlease"),
    "no model folder": (('path = "model"', 'path = "clients"'), r"not a model folder.*config\.json"),
    "no such folder": (('path = "model"', 'path = "./modell"'), r"no model folder at .*modell"),
    "targets": (("rank = 2", 'rank = 2\ntargets = ["qkv"]'), r"target 'qkv'; it has .*query"),
    "warm-up": (("warmup_rounds = 1", "warmup_rounds = 3"), r"warmup_rounds = 3 leaves no round.*rounds"),
    "clusters": (("warmup_rounds = 1", "warmup_rounds = 1\nmax_experts = 6"), r"6 clusters, but there are 5 clients"),
    "fixed clusters": (("warmup_rounds = 1", "warmup_rounds = 1\nexperts = 9"), r"9 clusters, but there are 5 clients"),
    "oracle": (("warmup_rounds = 1", 'warmup_rounds = 1\nallocation = "oracle"'), r"oracle.*group"),
    "engine": (("threads = 1", 'threads = 1\nname = "ray"'), r"unknown engine 'ray'; the engines are .*local"),
    "method of [methods]": (("[run]", "[methods.fedit]\nrank = 3\n[run]"), r"\[methods\.fedit\].*unknown key 'rank'"),
    "device": (('device = "cpu"', 'device = "gpu"'), r"gpu"),
    "length": (("max_length = 32", "max_length = 4096"), r"160 tokens.*4096"),
    "data": (('folder = "clients"', 'folder = "client"'), r"client"),
}


Refused = Callable[..., None]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line: it must exit with 2 and say why in a line or two."""

    def check(*args: str, because: str) -> None:
        monkeypatch.setattr(sys, "argv", ["coterie", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") <= 2
        assert re.search(because, error.replace("\n", " ")), error

    return check


@pytest.mark.parametrize("name", EDITS)
def test_a_bad_config(name: str, tmp_path: Path, refused: Refused) -> None:
    path = sites.config(tmp_path)
    (old, new), expected = EDITS[name]
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused("run", str(path), "--out", str(tmp_path / "out"), because=expected)
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_its_dot(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("coterie.nn.locate.get_hf_file_metadata", ask)
    path = sites.config(tmp_path)
    because = rf"no folder {tmp_path}/models/mine, no model .* in the hub's cache, .*not known; .*\(\./models/mine\)"
    refused("run", str(path), "--out", str(tmp_path / "out"), "--set", "model.path=models/mine", because=because)
    assert not (tmp_path / "out").exists()


ROWS = {  # what is wrong: (file, content, what the error says)
    "no such file": ("mood-0/train.jsonl", None, r"mood-0"),
    "empty client": ("mood-0/train.jsonl", "", r"mood-0/train\.jsonl"),
    "no label": ("size-0/train.jsonl", '{"text": "a", "label": "big"}\n{"text": "b"}\n', r"train\.jsonl:2"),
    "a label in capitals": (
        "size-0/train.jsonl",
        "".join(f'{{"text": "a{i}", "label": "{label}"}}\n' for i, label in enumerate(["big", "BIG", "small", "tiny"])),
        r"train\.jsonl:1: the label 'big' differs from 'BIG' only in capital letters",
    ),
    "a text of 5 MB": (
        "size-0/train.jsonl",
        '{"text": "a", "label": "big"}\n{"text": "%s", "label": "small"}\n{"text": "b", "label": "tiny"}\n'
        % ("ab " * 1_700_000),
        r"train\.jsonl:2: text has 5,100,000 characters, more than the 1,000,000",
    ),
    "bad line": ("size-0/train.jsonl", '{"text": "a", "label": "big"}\n{"text": \n', r"train\.jsonl:2"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows(name: str, tmp_path: Path, refused: Refused) -> None:
    path = sites.config(tmp_path)
    file, content, expected = ROWS[name]
    place = tmp_path / "clients" / file
    place.unlink() if content is None else place.write_text(content)
    refused("run", str(path), "--out", str(tmp_path / "out"), because=expected)
    assert not (tmp_path / "out").exists()


CHOICES = {  # what is wrong: (a row, what the error says after its file and line)
    "label out of range": ({"label": 3}, r"the label 3 is out of range for 3 candidates; 0 is the first"),
    "label text": ({"label": "vast"}, r"the label 'vast' is not one of the candidates big, small, tiny"),
    "one candidate": ({"choices": [" big"]}, r"choices holds 1 candidate\(s\); give two or more"),
    "empty candidate": ({"choices": [" big", ""]}, r"choices\[1\] is empty"),
    "no list": ({"choices": "big or small"}, r"choices is 'big or small', not a list of texts"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_bad_rows_to_choose_for(name: str, tmp_path: Path, refused: Refused) -> None:
    path = sites.config(tmp_path, "llama", kind="multiple_choice")
    change, expected = CHOICES[name]
    good, second, *_ = sites.choice_rows("size", 3, "")
    sites.write_rows(tmp_path / "clients" / "size-0" / "train.jsonl", [good, {**second, **change}])
    refused("run", str(path), "--out", str(tmp_path / "out"), because=r"size-0/train\.jsonl:2: " + expected)
    assert not (tmp_path / "out").exists()


TEMPLATES = {  # the template, what the error says
    "{text} {title} is": r"\.jsonl: no column 'title' for data\.columns\.template; its columns are text, label",
    "{text} is {label}": r"template has \{label\}, which puts the answer into the prompt",
    "{text is": r"\[data\] columns: .*write \{\{ and \}\} for braces",
    "is": r"\[data\] columns: .*'is' names no column",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_bad_templates(template: str, tmp_path: Path, refused: Refused) -> None:
    path = sites.config(tmp_path, "llama", kind="multiple_choice")
    sites.federation(tmp_path / "clients")
    more = ("--set", f"data.columns.template={template}", "--out", str(tmp_path / "out"))
    refused("run", str(path), *more, because=TEMPLATES[template])
    assert not (tmp_path / "out").exists()


def test_a_label_outside_the_clients_set(tmp_path: Path, refused: Refused) -> None:
    path = sites.config(tmp_path)
    path.write_text(path.read_text().replace('folder = "clients"', 'folder = "clients"\nlabels = ["bad", "good"]'))
    refused("run", str(path), because=r"\.jsonl:1.*(land|city|big).*bad, good")


def test_a_missing_config_and_bad_toml(tmp_path: Path, refused: Refused) -> None:
    refused("run", str(tmp_path / "none.toml"), because="there is no config file")
    refused("run", str(tmp_path), because="there is no config file")
    (tmp_path / "bad.toml").write_text("[run\n")
    refused("run", str(tmp_path / "bad.toml"), because=r"bad\.toml is not valid TOML")


def test_folders_that_are_taken_and_runs_that_are_not_there(tmp_path: Path, refused: Refused) -> None:
    path, out = sites.config(tmp_path, method="local"), tmp_path / "out"
    command = ("run", str(path), "--out", str(out))
    refused(*command, "--resume", because="no run to resume")
    out.mkdir()
    (out / "notes.txt").touch()
    refused(*command, because="is not empty; continue with --resume, or name another folder")
    (out / "notes.txt").rename(out / ".config.json.1.tmp")  # as a killed process leaves: nothing of a run
    run(load_config(path), out, root=tmp_path)
    assert not [*out.glob(".*.tmp")]
    (out / "summary.json").unlink()
    refused(*command, because="contains a run; continue with --resume, or name another folder")
    refused(*command, "--resume", "--set", "lora.rank=3", because=r"differs in lora\.rank")
    refused("run", str(path), "--out", str(path), because="is a file")
    for checkpoint in (out / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    refused(*command, "--resume", because="and neither can an earlier one")


def test_overrides() -> None:
    raw = {"data": {"folder": "x"}, "run": {"rounds": 3}}
    changed = override(raw, ["run.rounds=7", "model.path=some/folder", 'method.name="local"'])
    config = check_config(changed)
    assert (config.run.rounds, config.model.path, config.method_name) == (7, "some/folder", "local")
    assert raw["run"] == {"rounds": 3}
    with pytest.raises(CoterieError, match=r"not of the form section\.key=value"):
        override(raw, ["rounds 7"])


def test_a_diverging_client_is_named_with_its_step(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="local")
    path.write_text(path.read_text().replace("learning_rate = 0.01", "learning_rate = 1e30\nclip = 0.0"))
    with pytest.raises(
        CoterieError, match=r"quorum\]?[^.]*\. client mood-0: the loss is not finite at step \d+ of round 1"
    ):
        run(load_config(path), tmp_path / "out", root=tmp_path)


def test_ctrl_c_keeps_the_checkpoint_and_exits_with_130(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path), tmp_path / "out"
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 500"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from coterie.cli.main import main; main()", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    limit = time.monotonic() + 120
    while not (out / "checkpoints" / "000002.ckpt").exists():
        assert time.monotonic() < limit, process.communicate(timeout=10)
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with the same command and --resume" in errors
    assert "Traceback" not in errors
    config = load_config(path)
    torch.set_num_threads(1)
    heard: list[Event] = []

    def stop_soon(event: Event) -> None:
        heard.append(event)
        if isinstance(event, CheckpointSaved):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out, root=tmp_path, resume=True, listen=stop_soon)
    resumed = next(event for event in heard if isinstance(event, Resumed))
    assert resumed.round >= 2
