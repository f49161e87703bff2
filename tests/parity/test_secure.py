"""Secure sums on the engines: whoever runs the clients, the sum is that of plain averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sites
from coterie.config.load import load_config
from coterie.experiment import run

SECURE = "\n[secure_aggregation]\nenabled = true\n"
ENGINES = {"local": "", "batched": "clients_per_batch = 3", "batched by length": 'clients_per_batch = "auto"'}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A federation's config, and its experts after a round in the clear on the reference engine."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    path = sites.config(folder, method="fedit")
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 1"))
    return path, experts(path, folder / "run")


def experts(path: Path, out: Path) -> dict[str, torch.Tensor]:
    run(load_config(path), out, root=path.parent)
    return {f"{p.parent.name} {k}": v for p in out.glob("experts/*/*.safetensors") for k, v in load_file(p).items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_sum_of_an_engines_clients_is_their_plain_average(engine: str, plain: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path, expected = plain
    own = path.with_name(f"{engine.replace(' ', '-')}.toml")
    own.write_text(path.read_text().replace("[engine]\n", f"[engine]\n{ENGINES[engine]}\n") + SECURE)
    found = experts(own, tmp_path / "run")
    assert len(found) >= 4
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, atol=2e-5) for key, value in expected.items())
    assert '"sums"' in (tmp_path / "run" / "metrics.jsonl").read_text()
