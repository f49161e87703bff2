"""A run whose clients are sent only the experts that they use: what is loaded, onboarded and exported of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import coterie
import sites
from coterie.adapters.bundle import read_bundle
from coterie.artifacts.export import export
from coterie.artifacts.onboard import onboard
from coterie.methods.fedlease.state import FedLEASEState
from coterie.methods.parts import lora_of
from coterie.runs.exported import exported
from coterie.types import Tensors

CLIENTS, NEW = ("mood-0", "size-0", "place-0"), "mood-1"
USED = 'experts = 2\ndownload = "used"\ndownload_threshold = 1.0\nwarmup_rounds = 1\nrouting = '


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    "routing", ["top_k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adaptive", "dense"))]
)
def test_clients_keep_their_copies_and_newcomers_get_the_newest_experts(routing: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = sites.config(tmp_path, method="fedlease", run="evaluate_every = 4")
    text = path.read_text().replace("warmup_rounds = 1\n", f'{USED}"{routing}"\n').replace("rounds = 3", "rounds = 4")
    path.write_text(text)
    for folder in (tmp_path / "clients").iterdir():
        if folder.name not in CLIENTS:
            shutil.move(folder, tmp_path / folder.name)
    run = tmp_path / "run"
    coterie.run(path, run)
    newest = lora_of(exported(run, FedLEASEState).state.experts)
    assert {key.expert for key in newest} == {0, 1}

    held = {client: coterie.load(run, client).bank for client in CLIENTS}
    for client, bank in held.items():  # as it was evaluated, with what it received last
        assert same(bank.tensors, read_bundle(run / "clients" / client)[0].tensors)
        assert lora_of(bank.tensors).keys() == newest.keys()
        assert not same(lora_of(bank.tensors), newest)
    someone = coterie.load(run, labels=("bad", "good"))
    assert same(lora_of(someone.bank.tensors), newest)
    assert someone.bank.gate.name == {"adaptive": "softmax", "top_k": "top_k", "dense": "softmax"}[routing]
    joined = onboard(run, tmp_path / NEW, tmp_path / "joined", epochs=1)
    assert same(lora_of(joined.bank.tensors), newest)
    assert same(coterie.load(tmp_path / "joined").bank.tensors, joined.bank.tensors)
    made = export(run, "mood-0", tmp_path / "static", form="static")
    assert made.cost is not None
