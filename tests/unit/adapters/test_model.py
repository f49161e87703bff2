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
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.types import Bank, CoterieError

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
    about = tiny.about(base=str(base), task=task, method="fedlease", labels=LABELS if head else None)
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
    run, _ = export(tmp_path, base="/nowhere/model")
    with pytest.raises(CoterieError, match="no model folder at /nowhere/model"):
        coterie.load(run / "clients" / "south")
    south = coterie.load(str(run / "clients" / "south"), base=str(tmp_path / "model"))
    assert south.client == "south"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    run, _ = export(tmp_path)
    with pytest.raises(CoterieError, match=r"holds several bundles; name a client: north, south"):
        coterie.load(run)
    with pytest.raises(CoterieError, match=r"no bundle of 'nroth'; its clients are north, south"):
        coterie.load(run, client="nroth")
    with pytest.raises(CoterieError, match=r"no bundle\.safetensors in .*elsewhere or in a client's folder"):
        coterie.load(tmp_path / "elsewhere", client="north")
