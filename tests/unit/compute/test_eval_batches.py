"""How many rows are evaluated at once: by the device, with equal losses and less padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.compute import passes
from coterie.compute.client import LocalCompute
from coterie.compute.loading import eval_rows
from coterie.compute.workplace import Workplace
from coterie.config.load import check_config
from coterie.data.rows import ClientData, PromptRow, TextRow
from coterie.requests import Score
from coterie.types import ClientInfo, CoterieError
from workplaces import LABELS, make_workplace, plain_bank

DATA = {"data": {"folder": "clients"}}


@pytest.mark.parametrize(("device", "rows"), [("cpu", 16), ("cuda", 64)])
def test_auto_goes_by_the_device(device: str, rows: int) -> None:
    assert check_config(DATA).run.eval_batch_size == "auto"
    assert eval_rows("auto", torch.device(device)) == rows
    assert eval_rows(5, torch.device(device)) == 5


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(CoterieError, match=r"\[run\] eval_batch_size"):
        check_config({**DATA, "run": {"eval_batch_size": value}})


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_small_batches_give_equal_losses_and_pad_less(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = make_workplace(arch, torch.float32)
    texts = ["ab " * (1 + i * 7 % 10) for i in range(60)]
    rows = tuple(TextRow(t, i % LABELS) if arch == "bert" else PromptRow(t, " ab") for i, t in enumerate(texts))
    client = ClientData(ClientInfo("north", 1), {"test": rows})
    bank, real = plain_bank(workplace), passes.logits_of
    tokens: dict[int, list[int]] = {16: [], 64: []}

    def counting(workplace: Workplace, inputs: Mapping[str, Tensor]) -> Tensor:
        tokens[workplace.eval_batch_size].append(inputs["input_ids"].numel())
        return real(workplace, inputs)

    monkeypatch.setattr(passes, "logits_of", counting)
    few, many = (
        LocalCompute(replace(workplace, eval_batch_size=size), client, 1).score(Score([bank], "test"))[0]
        for size in (16, 64)
    )
    assert [len(of) for of in tokens.values()] == [4, 1]
    own = sum(len(example.ids) for example in workplace.examples(client, "test"))
    assert own <= sum(tokens[16]) < 0.8 * sum(tokens[64])
    assert few.loss == pytest.approx(many.loss, rel=1e-6)
    assert few.metrics.get("accuracy") == many.metrics.get("accuracy")
