"""Runs of the methods that average LoRAs: what they export, through PEFT, against the banks that clients evaluate."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sites
import tiny
from coterie import experiment
from coterie.adapters.bundle import read_bundle
from coterie.config.load import load_config
from coterie.methods.ranks import rank_of
from coterie.methods.registry import methods
from coterie.nn.attach import attached

CLIENTS = ["mood-0", "mood-1", "place-0", "size-0", "size-1"]
RANKS = dict(zip(CLIENTS, [2, 3, 1, 2, 3], strict=True))  # where they differ: tests/support/few_rounds.py
GLOBAL = ["fedprox", "ffa_lora", "rolora", "flexlora", "hetlora", "flora", "fedex_lora"]
KEPT = ["fedsa_lora", "local"]  # B stays with the clients: there is no expert of the server's


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny.batch(3, 7, padded=False)).logits
    return found


def through_peft(base: Any, folder: Path) -> torch.Tensor:
    """PEFT's logits; a key that it misses is only a warning there, here it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval())


@pytest.mark.parametrize("name", [*GLOBAL, *KEPT])
def test_the_exported_adapters_have_the_logits_of_the_clients_banks(name: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method=name)
    mixed = methods()[name].mixed_ranks
    config = load_config(path, ["lora.ranks=[2, 3, 1]"] if mixed else [])
    experiment.run(config, tmp_path / "out", root=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    without, seen = logits(base), []
    for client in CLIENTS:
        bank, _ = read_bundle(tmp_path / "out" / "clients" / client)
        assert name == "flora" or rank_of(bank.tensors) == (RANKS[client] if mixed else 2)
        with attached(base, bank):
            ours = logits(base)
        theirs = through_peft(base, tmp_path / "out" / "clients" / client / "adapter")
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5)
        assert (ours - without).abs().max() > 1e-3
        seen.append(ours)
    alike = [torch.equal(seen[0], other) for other in seen[1:]]
    assert not any(alike) if name in KEPT else any(alike) or mixed
    if name in GLOBAL:
        largest = max(CLIENTS, key=RANKS.__getitem__)
        theirs = through_peft(base, tmp_path / "out" / "experts" / "global")
        torch.testing.assert_close(theirs, seen[CLIENTS.index(largest)], atol=2e-5, rtol=2e-5)
    assert (tmp_path / "out" / "experts").exists() == (name in GLOBAL)
    errors = [json.loads(line).get("failed") for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert not any(errors)
