"""Routers learn: over a pool with a module that does the job and one that does its opposite, they take the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
import tiny
from coterie.adapters.pool import Pool, name_of, write_pool
from coterie.adapters.read import build_pool
from coterie.config.load import check_config
from coterie.experiment import run
from coterie.types import Part


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(folder: Path, method: dict[str, Any], rounds: int) -> Any:
    return check_config(
        {
            "model": {"path": str(folder / "model"), "max_length": 32},
            "data": {"folder": str(folder / "clients")},
            "task": {"kind": "generation"},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]},
            "train": {"learning_rate": 0.02, "batch_size": 8, "epochs": 4},
            "method": method,
            "run": {"rounds": rounds},
            "engine": {"threads": 1, "device": "cpu"},
        }
    )


def ran(folder: Path, out: str, method: dict[str, Any], rounds: int) -> tuple[list[float], list[dict[str, float]]]:
    """The mean test loss after each round, and the adapters' use as measured in it."""
    run(config(folder, method, rounds), folder / out, root=folder)
    events = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    losses = [e["mean"]["test"]["loss"] for e in events if e["event"] == "evaluation"]
    return losses, [e["describe"]["use"] for e in events if e["event"] == "round" and "use" in e["describe"]]


def poisoned(pool: Pool) -> Pool:
    """The pool with its adapter's opposite beside it, twice as strong."""
    (good,) = pool.adapters
    bad = replace(good, name="poison", first=good.rank)
    tensors = dict(pool.tensors)
    for key, value in pool.tensors.items():
        tensors[key._replace(expert=bad.first)] = -2 * value if key.part is Part.B else value
    tensors = dict(sorted(tensors.items()))
    return replace(pool, adapters=(good, bad), tensors=tensors, name=name_of(tensors))


@pytest.mark.slow
@pytest.mark.parametrize(
    "router",
    [
        {"router": "signed", "router_rate": 4.0},
        {"router": "mixing", "router_rate": 4.0},
        {"router": "response", "router_rate": 1.0},
    ],
)
def test_weights_of_the_experts_learn_it_too(tmp_path: Path, router: dict[str, Any]) -> None:
    tiny.folder(tmp_path / "model", "llama")
    sites.federation(tmp_path / "clients", "generation", clients=2, rows=16)
    (_, _, alone), _ = ran(tmp_path, "teacher", {"name": "fedit"}, 3)
    write_pool(tmp_path / "pool", poisoned(build_pool([str(tmp_path / "teacher" / "experts" / "global")])))
    method = {"name": "smartfed", "pool": "pool", "active": 2, "quota_interval": 1, "router_decay": 1.0, **router}
    losses, use = ran(tmp_path, "smart", method, 3)
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < alone + 0.1
    assert 0.5 > use[0]["poison"] > use[1]["poison"]


@pytest.mark.slow
def test_routing_takes_the_module_that_helps_and_leaves_the_poisoned_one(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", "llama")
    sites.federation(tmp_path / "clients", "generation", clients=2, rows=16)
    ran(tmp_path, "teacher", {"name": "fedit"}, 3)
    pool = poisoned(build_pool([str(tmp_path / "teacher" / "experts" / "global")]))
    write_pool(tmp_path / "pool", pool)

    method = {"name": "smartfed", "pool": "pool", "active": 2, "quota_interval": 1}
    losses, use = ran(tmp_path, "smart", {**method, "router": "paper"}, 3)
    assert losses[2] < losses[1] < losses[0]
    poison = [share["poison"] for share in use]
    assert 0.5 > poison[0] > poison[1] > poison[2]
    assert poison[2] < 0.35
    (by_default,), _ = ran(tmp_path, "default", method, 1)
    assert by_default < losses[2]
