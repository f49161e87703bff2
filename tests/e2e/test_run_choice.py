"""Whole runs on multiple choice: a federation that learns, from files of candidates and from files of labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sites
from coterie import experiment
from coterie.adapters.bundle import read_bundle
from coterie.config.load import load_config
from coterie.runs.summary import Summary
from coterie.types import DataError

MORE = [  # enough to learn which label goes with which word
    "lora.rank=8", "lora.targets=['q_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj']", "lora.dropout=0.0",
    "train.learning_rate=0.02", "train.epochs=3", "run.rounds=4", "run.evaluate_every=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(path: Path, out: Path, *changes: str) -> Summary:
    return experiment.run(load_config(path, changes), out, root=path.parent)


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [{**event, "seconds": 0} for event in events(out) if event["event"] == "evaluation"]


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_federation_learns_which_candidate_is_right(tmp_path: Path) -> None:
    """Three clients of one job with three labels, each of which goes with a word of the prompt."""
    path = sites.config(tmp_path, "llama", method="fedit", kind="multiple_choice")
    shutil.rmtree(tmp_path / "clients")
    for client in ("north", "south", "east"):
        for split, number in (("train", 24), ("validation", 6), ("test", 18)):
            rows = sites.choice_rows("size", number, f"{client} {split}")
            sites.write_rows(tmp_path / "clients" / client / f"{split}.jsonl", rows)
    untrained = run(path, tmp_path / "before", *MORE, "train.learning_rate=1e-12", "run.rounds=1", "train.epochs=1")
    summary = run(path, tmp_path / "out", *MORE)
    assert (summary.task, summary.primary) == ("multiple_choice", "accuracy")
    assert summary.clients["north"].labels == ["big", "small", "tiny"]
    found = summary.mean["test"]
    assert found.keys() == {"accuracy", "macro_f1", "matthews", "loss"}
    assert untrained.mean["test"]["accuracy"] < 0.5
    assert found["accuracy"] > 0.7, "chance is 1/3"
    assert found["loss"] < untrained.mean["test"]["loss"] / 2
    assert "Accuracy by round" in (tmp_path / "out" / "report.html").read_text()

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapter = tmp_path / "out" / "experts" / "global"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert PeftModel.from_pretrained(base, str(adapter)).active_adapters == ["default"]
    _, info = read_bundle(tmp_path / "out" / "clients" / "north")
    assert (info.task, info.labels) == ("multiple_choice", ("big", "small", "tiny"))


def test_files_of_labels_and_a_template_are_the_same_as_files_of_candidates(tmp_path: Path) -> None:
    """One federation written in three ways: a column of candidates, a prompt and label names, texts and a template."""
    found = []
    for name in ("candidates", "prompts", "texts"):
        path = sites.config(tmp_path / name, "llama", method="fedit", kind="multiple_choice")
        sites.federation(tmp_path / name / "clients", "classification" if name == "texts" else "multiple_choice")
        for file in (tmp_path / name / "clients").rglob("*.jsonl") if name == "prompts" else ():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            made = [{"prompt": row["prompt"], "label": row["choices"][row["label"]].strip()} for row in rows]
            sites.write_rows(file, made)
        template = ["data.columns.template={text}"] if name == "texts" else []
        run(path, tmp_path / name / "out", *template, "run.rounds=2")
        found.append(evaluations(tmp_path / name / "out"))
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("method", ["fedlease", "local"])
def test_candidates_that_differ_from_row_to_row(method: str, tmp_path: Path) -> None:
    """Then there are no labels, and a place in the list says nothing: accuracy alone is measured."""
    path = sites.config(tmp_path, "gpt2", method=method, kind="multiple_choice", run="eval_batch_size = 5")
    for file in (tmp_path / "clients").rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        turned = [
            {**row, "choices": row["choices"][::-1], "label": len(row["choices"]) - 1 - row["label"]} for row in rows
        ]
        sites.write_rows(file, [*rows[::2], *turned[1::2]])
    summary = run(path, tmp_path / "out")
    assert {row.labels for row in summary.clients.values()} == {None}
    assert summary.mean["test"].keys() == {"accuracy", "loss"}


@pytest.mark.parametrize("together", ["1", "2"])
def test_a_row_that_cannot_be_encoded_fails_its_client_alone(together: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, "gpt2", method="fedit", kind="multiple_choice")
    row = {"prompt": "one", "choices": [f" {'great ' * 40}one", f" {'great ' * 40}two"], "label": 0}
    with (tmp_path / "clients" / "size-0" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run(path, tmp_path / "out", "run.rounds=1", f"engine.clients_per_batch={together}")
    (done,) = (event for event in events(tmp_path / "out") if event["event"] == "round")
    assert list(done["failed"]) == ["size-0"]
    assert "two candidates have the same tokens" in done["failed"]["size-0"]
    (cut,) = (event for event in events(tmp_path / "out") if event["event"] == "truncated")
    assert cut["rows"] == 4 * 12 + 5 * (6 + 6), "all but the client's training rows"


def test_a_test_row_that_cannot_be_encoded_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "gpt2", method="fedit", kind="multiple_choice")
    row = {"prompt": "one", "choices": [f" {'great ' * 40}one", f" {'great ' * 40}two"], "label": 0}
    sites.write_rows(tmp_path / "clients" / "size-0" / "test.jsonl", [row])
    with pytest.raises(DataError, match="client size-0, a test row: two candidates have the same tokens"):
        run(path, tmp_path / "out", "run.rounds=1")
    assert not [event for event in events(tmp_path / "out") if event["event"] == "round"]
