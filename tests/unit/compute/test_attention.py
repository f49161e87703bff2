"""``[engine] attention``: the same training with each implementation, and an error for one that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.types import CoterieError
from workplaces import largest_difference, make_workplace, plain_bank, sgd, train

torch.set_num_threads(1)


def config_of(path: Path, attention: str) -> Config:
    return check_config({
        "data": {"folder": "c"}, "model": {"path": str(path), "max_length": 32}, "task": {"kind": "generation"},
        "engine": {"attention": attention, "device": "cpu"}, "method": {"name": "fedit"},
    })  # fmt: skip


def test_the_setting_reaches_the_model_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    path, cache = tiny.folder(tmp_path / "model", "llama"), dict[str, Any]()
    for name in ("eager", "sdpa"):
        (workplace,) = workplaces(config_of(path, name), tmp_path, cache)
        assert workplace.base.model.config._attn_implementation == name
    with pytest.raises(CoterieError, match=r"\[engine\] attention = 'flash_attention_2' does not work here: "):
        workplaces(config_of(path, "flash_attention_2"), tmp_path, cache)


@pytest.mark.parametrize("packing", [False, True])
def test_training_is_the_same_with_each(packing: bool) -> None:
    made = []
    for name in ("eager", "sdpa"):
        workplace = make_workplace("llama")
        workplace.base.use_attention(name)
        bank = plain_bank(workplace, experts=2, gate="softmax")
        made.append(train(workplace, bank, sgd(2).model_copy(update={"packing": packing})))
    assert largest_difference(made[0].tensors, made[1].tensors) < 1e-6  # eager takes its softmax in float32
