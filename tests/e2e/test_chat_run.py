"""Conversations from files to a model that answers, with a chat template of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import coterie
import tiny
from coterie.adapters.bundle import read_bundle, write_bundle
from coterie.artifacts.evaluate import evaluate
from coterie.config.deployment import SiteSettings
from coterie.config.load import load_config
from coterie.deploy.agreement import config_at, federation_config, terms_of
from coterie.inference.answers import TextAnswer
from coterie.types import CoterieError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = """
[model]
path = "base"
chat_template = "chat.jinja"
max_length = 96
[task]
kind = "generation"
generate = true
scores = ["token_f1", "numeric"]
max_new_tokens = 4
turns = "last"
[data]
folder = "clients"
[lora]
rank = 2
[train]
batch_size = 4
[method]
name = "fedit"
[run]
rounds = 1
[engine]
threads = 1
device = "cpu"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    tiny.folder(tmp_path / "base", "llama")
    for client in ("north", "south"):
        (tmp_path / "clients" / client).mkdir(parents=True)
        rows = [
            {"messages": [{"role": "user", "content": f"{client} {i}"}, {"role": "assistant", "content": f"so {i}"}]}
            for i in range(12)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "clients" / client / "train.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    (tmp_path / "chat.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def test_from_conversations_to_a_model_that_answers(folder: Path) -> None:
    summary = coterie.run(folder / "chat.toml", folder / "run")
    assert set(summary.mean["test"]) >= {"loss", "token_f1", "numeric"}
    manifest = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["clients"]["north"]["forms"] == {"clients/north/train.jsonl": "messages"}
    north: Any = coterie.load(folder / "run", "north")
    assert north.tokenizer.chat_template == TEMPLATE
    (answer,) = north.predict([{"messages": [{"role": "user", "content": "north 3"}]}])
    assert isinstance(answer, TextAnswer)
    prompt = north.tokenizer("[user]north 3</s>[assistant]", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        made = north.model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.text == north.tokenizer.decode(made, skip_special_tokens=True)
    measured_alike_without_the_run(folder)


def measured_alike_without_the_run(folder: Path) -> None:
    """A bundle alone measures as the run does: the last turn's loss, the same scores of texts of the same length."""
    said = [("user", "north 1"), ("assistant", "so 1"), ("user", "and 2"), ("assistant", "so 2")]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n", encoding="utf-8")
    bundle = folder / "run" / "clients" / "north"
    measured = evaluate(folder / "run", "north", data=rows).metrics
    assert measured.keys() == {"loss", "perplexity", "token_f1", "numeric"}
    assert evaluate(bundle, data=rows).metrics == measured
    bank, about = read_bundle(bundle)
    assert about.texts is not None
    assert coterie.load(bundle).max_new_tokens == about.texts.max_new_tokens == 4
    write_bundle(bundle, bank, replace(about, texts=replace(about.texts, turns="all")))
    assert evaluate(bundle, data=rows).metrics["loss"] != measured["loss"]
    assert evaluate(folder / "run", "north", data=rows).metrics == measured


@pytest.mark.parametrize(
    ("text", "fault"),
    [(None, "cannot read"), ("", "template is empty"), ("{% for m in messages %}x", "not a valid chat template")],
)
def test_a_template_that_is_no_template_is_an_error(folder: Path, text: str | None, fault: str) -> None:
    if text is None:
        (folder / "chat.jinja").unlink()
    else:
        (folder / "chat.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(CoterieError, match=rf"{fault}"):
        coterie.run(folder / "chat.toml", folder / "run")


def test_a_site_takes_its_template_from_its_own_file(folder: Path) -> None:
    raw = load_config(folder / "chat.toml").model_dump(mode="json", exclude_none=True, exclude={"data", "federation"})
    server = federation_config({**raw, "federation": {"sites": ["north"]}})
    assert "chat.jinja" not in json.dumps(terms_of(server))
    own = {"site": {"id": "north", "server": "127.0.0.1:9"}, "data": {"train": "north.jsonl"}}
    for model, expected in (({}, None), ({"chat_template": "mine.jinja"}, "mine.jinja")):
        site = SiteSettings.model_validate({**own, "model": model})
        assert config_at(site, terms_of(server)).model.chat_template == expected
