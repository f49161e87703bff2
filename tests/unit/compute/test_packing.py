"""Packed rows: the same tokens and labels in fewer rows, and the training that padded rows give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

import tiny
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.data.examples import IGNORE
from coterie.data.packing import first_fit, packed
from coterie.data.rows import PromptRow
from coterie.nn.base import Base
from coterie.nn.packs import check_packs
from coterie.requests import Balance, Train
from coterie.types import CoterieError
from workplaces import client_of, largest_difference, make_workplace, plain_bank, sgd, train

torch.set_num_threads(1)
GATES: dict[str, dict[str, Any]] = {
    "softmax": {"gate": "softmax", "experts": 3},
    "scaled_dot_product": {"gate": "scaled_dot_product", "options": {"k": 1}, "experts": 3},
    "similarity": {"gate": "similarity", "options": {"scale": 0.5}, "experts": 2, "slots": 1},
}


def packing(steps: int, accumulate: int = 1, on: bool = True) -> Any:
    return sgd(steps, accumulate).model_copy(update={"packing": on})


def test_the_longest_go_first_into_bins_of_its_length() -> None:
    assert first_fit([2, 5, 3, 1, 4, 5], 5) == [[1], [5], [4, 3], [2, 0]]


def test_a_packed_batch_has_the_same_tokens_and_labels_in_fewer_rows() -> None:
    task = make_workplace("llama").task
    rows = [PromptRow("ab", " c"), PromptRow("a longer text", " and more"), PromptRow("x", ""), PromptRow("y", " z")]
    batch = task.collate([task.encode(row) for row in rows])
    made = packed(batch, 0)
    assert made.segments is not None
    assert made.mask.shape[0] < batch.mask.shape[0]
    assert made.mask.shape[1] == batch.mask.shape[1]
    assert made.count == batch.count
    for labels in (lambda b: b.labels.flatten()[b.before_labels + 1], lambda b: b.inputs["input_ids"][b.mask.bool()]):
        assert sorted(labels(made).tolist()) == sorted(labels(batch).tolist())
    starts = made.inputs["position_ids"] == 0
    number = [int(((made.segments[row] > 0) & starts[row]).sum()) for row in range(len(made.segments))]
    assert sum(number) == 4
    assert [int(row.max()) for row in made.segments] == number
    assert not made.inputs["position_ids"][made.segments == 0].any()


def test_the_first_token_of_a_packed_row_is_not_predicted_from_the_row_before_it() -> None:
    task = make_workplace("llama").task
    batch = task.collate([task.encode(PromptRow(text, " z")) for text in ("a", "b c", "a longer text")])
    made = packed(replace(batch, labels=batch.inputs["input_ids"]), 0)  # every token has a label
    assert made.segments is not None
    first = (made.inputs["position_ids"] == 0) & (made.segments > 0)
    assert int(first.sum()) == 3
    assert (made.labels[first] == IGNORE).all()
    assert (made.labels[(made.segments > 0) & ~first] != IGNORE).all()


@pytest.mark.parametrize("arch", tiny.DECODERS)
@pytest.mark.parametrize("gate", GATES)
def test_training_on_packed_rows_is_that_on_padded_ones(arch: str, gate: str) -> None:
    workplace = make_workplace(arch)
    bank = plain_bank(workplace, **GATES[gate])
    balance = Balance(0.1) if gate != "similarity" else None
    one, other = (train(workplace, bank, packing(2, 2, on), balance=balance) for on in (False, True))
    assert largest_difference(one.tensors, bank.tensors) > 1e-4
    assert largest_difference(one.tensors, other.tensors) < 1e-11
    assert (other.loss, other.balance) == (pytest.approx(one.loss, abs=1e-11), pytest.approx(one.balance, abs=1e-11))
    assert (other.examples, other.tokens, other.steps) == (one.examples, one.tokens, one.steps)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("gate", ["softmax", "similarity"])
def test_many_clients_share_a_pass_of_packed_rows(
    gate: str, chunk: int, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: each client draws the masks that it draws alone. ``flat``: as for attention of variable length."""
    monkeypatch.setattr(Base, "packs_flat", flat)
    workplace = make_workplace("llama", loss_chunk=chunk)
    bank = plain_bank(workplace, dropout=0.2, **GATES[gate])
    computes = [LocalCompute(workplace, client_of(workplace, name, n), 1) for name, n in (("a", 8), ("b", 5), ("c", 2))]
    request = Train(bank, frozenset(bank.tensors), packing(2, 2))
    together = answer_all([(compute, request) for compute in computes], print)
    for compute, made in zip(computes, together, strict=True):
        alone = compute.train(request)
        assert largest_difference(made.tensors, alone.tensors) < 1e-11
        assert made.loss == pytest.approx(alone.loss, abs=1e-11)


def test_packed_rows_do_not_see_each_other_in_the_trial() -> None:
    for arch in tiny.DECODERS:
        check_packs(make_workplace(arch).base)
    workplace = make_workplace("llama")
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=300))
    base = replace(workplace.base, model=bloom.eval().requires_grad_(False))
    with pytest.raises(CoterieError, match=r"cannot be packed.*leave out \[train\] packing"):
        check_packs(base)


@pytest.mark.parametrize("arch", tiny.DECODERS)
def test_the_trial_runs_in_the_precision_of_the_run(arch: str, tmp_path: Path) -> None:
    config = check_config({
        "data": {"folder": "c"}, "model": {"path": str(tiny.folder(tmp_path / "model", arch)), "max_length": 32},
        "task": {"kind": "generation"}, "train": {"packing": True},
        "engine": {"precision": "bfloat16", "device": "cpu"},
    })  # fmt: skip
    (workplace,) = workplaces(config, tmp_path, {})
    assert workplace.precision == "bfloat16"
    held = any(parameter.dtype == torch.bfloat16 for parameter in workplace.base.model.parameters())
    assert held == (arch != "gpt2")  # which has Conv1D in place of Linears
    small = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=300, initializer_range=0.5)
    bloom = AutoModelForCausalLM.from_config(small)
    other = replace(workplace.base, model=bloom.eval().requires_grad_(False))
    with workplace.autocast(), pytest.raises(CoterieError, match="cannot be packed"):
        check_packs(other)


def test_what_cannot_be_packed_is_refused() -> None:
    for task in ({}, {"kind": "generation", "objective": "dpo"}):
        config = check_config({"data": {"folder": "c"}, "train": {"packing": True}, "task": task})
        with pytest.raises(CoterieError, match=r"\[train\] packing works with generation and multiple_choice, not"):
            config.make_method(None)  # type: ignore[arg-type]
    workplace = make_workplace("llama")
    bank = plain_bank(workplace, experts=2, gate="softmax")
    with pytest.raises(CoterieError, match="leaves no padding, and the method counts it"):
        train(workplace, bank, packing(1), balance=Balance(0.1, padding=True))
