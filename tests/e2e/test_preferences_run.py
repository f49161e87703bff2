"""Preferences from files to a run that is measured by its rewards, goes on with the same bits, and can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import coterie
import sites
from coterie.artifacts.evaluate import evaluate
from coterie.config.load import load_config
from coterie.inference.answers import TextAnswer
from coterie.runs.events import RoundStart
from stop_run import stop_run


@pytest.mark.parametrize("reference", ["round", "base"])
def test_a_run_that_stops_goes_on_with_the_same_bits(reference: str, tmp_path: Path) -> None:
    """Half a cohort, so that groups differ from round to round: the base's part is computed for each client alone."""
    torch.set_num_threads(1)
    path = sites.config(tmp_path, "llama", method="fedit", kind="dpo", run="cohort = 0.6", more="clients_per_batch = 2")
    path.write_text(path.read_text().replace("[lora]", f'reference = "{reference}"\n[lora]'))
    whole = coterie.run(path, tmp_path / "whole")
    stop_run(coterie.run, path, tmp_path / "parts", when=lambda e: isinstance(e, RoundStart) and e.round == 3)
    assert coterie.run(path, tmp_path / "parts", resume=True).mean == whole.mean
    for name in ("experts", "personal", "clients"):
        one, other = ((tmp_path / run / name).rglob("*.safetensors") for run in ("whole", "parts"))
        assert [file.read_bytes() for file in sorted(one)] == [file.read_bytes() for file in sorted(other)]

    assert set(whole.mean["test"]) == {"loss", "reward_accuracy", "margin"}
    assert whole.primary == "loss"
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["clients"]["mood-0"]["forms"].values()) == {"preference"}
    assert "reward accuracy" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    measured = evaluate(tmp_path / "whole", client="mood-0")
    assert measured.metrics["reward_accuracy"] == whole.clients["mood-0"].test["reward_accuracy"]
    own, bundle = tmp_path / "clients" / "mood-0" / "test.jsonl", tmp_path / "whole" / "clients" / "mood-0"
    assert evaluate(bundle, data=own).metrics == pytest.approx(dict(measured.metrics))
    (answer,) = coterie.load(tmp_path / "whole", "mood-0").predict([{"prompt": "one awful 3"}])
    assert isinstance(answer, TextAnswer)


def test_rows_of_one_answer_are_refused(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method="fedit")
    path.write_text(path.read_text().replace("[lora]", 'objective = "dpo"\n[lora]'))
    assert load_config(path).task.objective == "dpo"
    with pytest.raises(coterie.CoterieError, match="this row has one answer alone"):
        coterie.run(path, tmp_path / "run")
