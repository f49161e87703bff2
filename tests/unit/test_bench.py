"""Every bench runs in its quick form and writes what it says; its figures are not looked at."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PUBLIC = ("examples/data", "../shared/data")
BENCHES = sorted(path for path in BENCH.glob("*.py") if not path.name.startswith("_"))
# Several processes, or several whole runs.
SLOW = {
    "attacks",
    "allocation",
    "auto",
    "batched",
    "cluster",
    "assignment",
    "rounds",
    "membership",
    "privacy",
    "privacy_cost",
    "published_code",
    "flower",
    "scaling",
    "uneven",
    "serve",
    "onboard",
    "gpu",
    "plan",
    "instructions",
}


def test_the_benches_are_found() -> None:
    assert {"layer", "gather", *SLOW} <= {path.stem for path in BENCHES}


def printed(script: Path, *options: str, seconds: int = 300) -> str:
    """What the quick form of a bench prints."""
    command, env = [sys.executable, str(script), "--quick", *options], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "bench",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in BENCHES],
)
def test_quick_form(bench: Path, tmp_path: Path) -> None:
    seconds = 900 if bench.stem == "gpu" else 300  # it runs several of the others
    printed(bench, "--threads", "1", "--out", str(tmp_path), seconds=seconds)
    (path,) = tmp_path.glob("*.json")
    assert path.stem == bench.stem
    found = json.loads(path.read_text())
    assert found["bench"] == bench.stem
    assert found["quick"] is True
    assert {"python", "torch", "transformers", "peft", "coterie"} <= found["measured_on"]["versions"].keys()
    assert {"cpu", "cores", "threads", "memory_bytes", "gpus", "load"} <= found["measured_on"]["machine"].keys()
    assert found["measured_on"]["machine"]["threads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["skills/active", "clusters/mixed"])
def test_quick_form_of_a_comparison(bench: str, tmp_path: Path) -> None:
    if bench == "clusters/mixed" and not any((BENCH.parent / place).exists() for place in PUBLIC):
        pytest.skip("the public datasets are not here")
    more = ["--work", str(tmp_path)] if bench == "skills/active" else ["--seeds", "0"]
    for _ in range(2):  # the second goes on where the first one ended
        printed(BENCH / f"{bench}.py", "--out", str(tmp_path), *more)
    found = json.loads((tmp_path / f"{Path(bench).name}.json").read_text())
    assert found["quick"] is True
    assert len(found["rows"]) >= 2


@pytest.mark.parametrize("name", ["layer", "cluster", "assign"])
def test_recorded_results_are_not_a_quick_runs(name: str) -> None:
    found = json.loads((BENCH / "results" / f"{name}.json").read_text())
    assert found["quick"] is False
    assert found["targets"]


def test_the_public_datasets_are_named_or_the_script_that_downloads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    harness = importlib.import_module("_harness")
    monkeypatch.setattr(harness, "DATA", (tmp_path / "examples", tmp_path / "shared"))
    with pytest.raises(SystemExit, match=r"run `python examples/fetch_data.py` to download them"):
        harness.datasets()
    (tmp_path / "shared").mkdir()
    assert harness.datasets() == tmp_path / "shared"
    (tmp_path / "examples").mkdir()
    assert harness.datasets() == tmp_path / "examples"
    with pytest.raises(SystemExit, match=r"there is no .*elsewhere"):
        harness.datasets(tmp_path / "elsewhere")


@pytest.mark.slow
def test_quick_form_of_the_peers(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    said = printed(BENCH / "peers" / "run.py", "--threads", "1", "--out", str(tmp_path), "--environments", none)
    assert "make it with bench/peers/setup.sh" in said
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["Coterie, one at a time", "Coterie, batched", "Coterie, batched, bfloat16"]
    assert all(row["round_s"] > 0 and row["loss"] > 0 for row in rows)
