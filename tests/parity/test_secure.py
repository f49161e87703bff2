"""Secure sums on the engines: whoever runs the clients, the sum is that of plain averaging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sites
from coterie.config.load import load_config
from coterie.experiment import run

SECURE = "\n[secure_aggregation]\nenabled = true\n"
ENGINES = {"local": "", "batched": "clients_per_batch = 3", "batched by length": 'clients_per_batch = "auto"'}
RAY = 'name = "flower-sim"\nray = { clients_at_once = 1, object_store_mib = 80 }'
# Sums are exact on a grid of 1.8e-10, finer than the float32 that experts are rounded to at the end: experts are below
# 1, where that is 6e-8 at most. The plain mean, which adds float32 in another order, is as far off.
SUMS = 1e-7
TRAINING = 2e-5  # what another order of float32 in a pass over many clients changes of a trained value, in one round


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's config, of one round."""
    torch.set_num_threads(1)
    path = sites.config(tmp_path_factory.mktemp("made"), method="fedit")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 1"))
    return path


@pytest.fixture(scope="module")
def plain(made: Path) -> dict[str, torch.Tensor]:
    """The experts after a round in the clear on the reference engine."""
    return experts(made, "", made.parent / "plain")


def experts(made: Path, engine: str, out: Path, more: str = "") -> dict[str, torch.Tensor]:
    path = made.with_name(f"{out.name}.toml")
    path.write_text(made.read_text().replace("[engine]\n", f"[engine]\n{engine}\n") + more)
    run(load_config(path), out, root=made.parent)
    assert ('"sums": {' in (out / "metrics.jsonl").read_text()) == bool(more)
    found = {f"{p.parent.name} {k}": v for p in out.glob("experts/*/*.safetensors") for k, v in load_file(p).items()}
    assert len(found) >= 4
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two values."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_sum_of_an_engines_clients_is_their_plain_average(
    engine: str, made: Path, plain: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    own = experts(made, ENGINES[engine], tmp_path / "own") if ENGINES[engine] else plain
    hidden = experts(made, ENGINES[engine], tmp_path / "hidden", SECURE)
    assert max(float(value.abs().max()) for value in hidden.values()) < 1
    assert apart(hidden, own) < SUMS
    assert apart(hidden, plain) < TRAINING


@pytest.mark.ray
@pytest.mark.slow
def test_flowers_simulation_opens_the_same_sums(made: Path, tmp_path: Path) -> None:
    """Clients train there as on the local engine, and sums of integers are the same in any order: bit for bit."""
    torch.set_num_threads(1)
    here = experts(made, "", tmp_path / "here", SECURE)
    assert apart(experts(made, RAY, tmp_path / "there", SECURE), here) == 0.0
