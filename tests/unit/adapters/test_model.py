"""``coterie.load``: a client's bundle as a transformers model that its own pipeline takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import coterie
import tiny
from coterie.adapters.bundle import write_bundle
from coterie.adapters.model import bundle_folder
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.nn.locate import folder_of, hub_name, shared_name
from coterie.nn.weights import digests, fingerprint
from coterie.types import Bank, CoterieError, Part

torch.set_num_threads(1)
LABELS = ("calm", "urgent", "spam", "praise", "other")
TEXTS = ["the printer smokes", "a very long day indeed", "x"]


def export(folder: Path, arch: str = "bert", **info: Any) -> tuple[Path, Bank]:
    """A run's folder with the bundles of two clients, on a tiny base."""
    base = tiny.folder(folder / "model", arch)
    task = "classification" if arch == "bert" else "generation"
    made = load_base(str(base), task).model
    experts = tiny.bank(tiny.targets(made), experts=3, gate="slot_top_k", options={"own": 1})
    head = tiny.head(made, len(LABELS)) if task == "classification" else {}
    bank = Bank({**experts.tensors, **head}, experts.gate, experts.scaling)
    about = tiny.about(base="model", base_path=str(base), task=task, method="fedlease", labels=LABELS if head else None)
    for client in ("north", "south"):
        write_bundle(folder / "run" / "clients" / client, bank, replace(about, client=client, **info))
    return folder / "run", bank


def test_a_clients_model_has_its_logits_and_its_labels(tmp_path: Path) -> None:
    run, bank = export(tmp_path)
    north = coterie.load(run, client="north")
    assert (north.client, north.labels, north.task) == ("north", LABELS, "classification")
    assert (north.method, north.round) == ("fedlease", 3)
    batch = north.tokenizer(TEXTS, return_tensors="pt", padding=True)
    base = load_base(str(tmp_path / "model"), "classification")
    with torch.no_grad(), attached(base.model, bank):
        expected = base.model(**batch).logits
        assert torch.equal(north.model(**batch).logits, expected)
    assert expected.shape == (len(TEXTS), len(LABELS))

    classify = pipeline("text-classification", model=north.model, tokenizer=north.tokenizer)
    said = [found["label"] for found in classify(TEXTS)]
    alone = [base.tokenizer([text], return_tensors="pt") for text in TEXTS]
    with torch.no_grad(), attached(base.model, bank):
        assert said == [LABELS[int(base.model(**inputs).logits.argmax())] for inputs in alone]
    assert north.model.config.label2id["spam"] == 2  # type: ignore[union-attr, index]


def test_a_text_that_is_too_long_is_cut_where_the_pipeline_is_asked_to(tmp_path: Path) -> None:
    north = coterie.load(export(tmp_path)[0], "north")
    classify = pipeline("text-classification", model=north.model, tokenizer=north.tokenizer, truncation=True)
    assert classify("word " * 500)[0]["label"] in LABELS


def test_a_generators_model_writes_text(tmp_path: Path) -> None:
    run, _ = export(tmp_path, "llama")
    north = coterie.load(run, client="north")
    assert north.labels is None
    write = pipeline("text-generation", model=north.model, tokenizer=north.tokenizer)
    (found,) = write("one two", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("one two")


def test_a_bundles_own_folder_needs_no_client_and_a_base_may_be_elsewhere(tmp_path: Path) -> None:
    run, _ = export(tmp_path, base_path="/nowhere/model")
    with pytest.raises(CoterieError, match=r"no base 'model' here, which was in /nowhere/model .*base=\.\.\."):
        coterie.load(run / "clients" / "south")
    south = coterie.load(str(run / "clients" / "south"), base=str(tmp_path / "model"))
    assert south.client == "south"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    run, _ = export(tmp_path)
    with pytest.raises(CoterieError, match=r"holds several bundles; name a client: north, south"):
        bundle_folder(run, None)
    with pytest.raises(CoterieError, match=r"no bundle of 'nroth'; its clients are north, south"):
        coterie.load(run, client="nroth")
    with pytest.raises(CoterieError, match=r"no bundle\.safetensors in .*elsewhere or in a client's folder"):
        coterie.load(tmp_path / "elsewhere", client="north")


def test_a_base_with_other_weights_is_refused(tmp_path: Path) -> None:
    run, bank = export(tmp_path)
    modules = {key.module for key in bank.tensors if key.part is Part.A}
    right = fingerprint(digests(str(tmp_path / "model"), modules), modules)
    assert len(right) == 64
    run, _ = export(tmp_path, base_sha256=right)
    assert coterie.load(run, "north").round == 3
    other = tiny.folder(tmp_path / "other", "bert", seed=5)
    with pytest.raises(CoterieError, match=r"other has other weights than the base .*'model'.*base=\.\.\."):
        coterie.load(run, "north", base=str(other))


def test_a_digest_is_unknown_where_that_of_a_module_is() -> None:
    assert fingerprint({"a": "1", "b": "2"}, ["b", "a"]) == fingerprint({"b": "2", "a": "1", "c": "3"}, ["a", "b"])
    assert fingerprint({"a": "1"}, ["a"]) != fingerprint({"b": "1"}, ["b"])
    assert fingerprint({"a": "1", "b": ""}, ["a", "b"]) == fingerprint({"a": "1"}, ["b"]) == fingerprint({}, []) == ""


def test_a_long_text_is_cut_where_evaluation_cut_it(tmp_path: Path) -> None:
    north = coterie.load(export(tmp_path, max_length=9)[0], "north")
    assert north.tokenizer("word " * 500, truncation=True)["input_ids"][-1] == north.tokenizer.sep_token_id
    assert len(north.tokenizer("word " * 500, truncation=True)["input_ids"]) == 9


@pytest.mark.parametrize(
    ("path", "name", "folder"),
    [
        ("model", "model", "model"),
        ("{here}/model", "model", "model"),
        ("org/base", "org/base", ""),
        ("/no/base", "base", ""),
    ],
)
def test_others_know_a_base_by_its_name(path: str, name: str, folder: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", "bert")
    path = path.format(here=tmp_path)
    assert shared_name(path, tmp_path) == name
    assert folder_of(path, tmp_path) == (str(tmp_path / folder) if folder else "")
    assert (shared_name("minilm"), hub_name("minilm")) == ("minilm", "sentence-transformers/all-MiniLM-L6-v2")
