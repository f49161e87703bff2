"""Operations of training are counted from shapes and tokens, and reach the summary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import short_runs
from coterie.compute.flops import training_flops
from coterie.engines.checks import fault_of
from coterie.methods.parts import statistics
from coterie.requests import Train, Trained
from coterie.types import NO_EXPERT, Bank, Key, Part, Reply

A, B, ROUTER = Key("q", 0, Part.A), Key("q", 0, Part.B), Key("q", NO_EXPERT, Part.ROUTER)
HEAD = Key("score", NO_EXPERT, Part.HEAD)


def test_a_matrix_costs_4_operations_a_number_and_6_where_it_trains() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    shapes = {A: (2, 4), B: (3, 2), ROUTER: (5, 4), HEAD: (2, 3)}
    bank = Bank({key: torch.zeros(shape) for key, shape in shapes.items()})
    for trainable, more in (((), 0), ((B,), 6), ((A, B, HEAD), 14)):
        request = Train(bank, frozenset(trainable), short_runs.OPTIM)
        assert training_flops(model, request) == 4 * (12 + 8 + 6 + 20) + 2 * more


def test_every_reply_reports_its_operations(tmp_path: Path) -> None:
    method = short_runs.make("fedit")
    ended = short_runs.run(method, short_runs.clients("mood-0", "size-0"), tmp_path)
    bank = ended.banks["mood-0"]
    lora = sum(v.numel() for k, v in bank.tensors.items() if k.part in (Part.A, Part.B))
    matrices = [m for m in ended.engine.workplace.base.model.modules() if isinstance(m, nn.Linear)]
    base = sum(m.in_features * m.out_features for m in matrices)
    for reply in ended.replies.values():
        assert reply.info["gflop"] == pytest.approx(reply.info["tokens"] * (4 * base + 6 * lora) / 1e9)


def test_a_training_without_a_count_reports_none_and_a_wrong_one_is_refused() -> None:
    assert "gflop" not in statistics(Trained({}, 1.0, 1, 1, 1))
    for wrong in (-1.0, "many", 1e16, float("nan")):
        assert fault_of(Reply({}, 1, {"gflop": wrong}), {}, 1.0, 1) is not None
    assert fault_of(Reply({}, 1, {"gflop": 12.5}), {}, 1.0, 1) is None
