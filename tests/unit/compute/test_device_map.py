"""Training and evaluation on a base whose parts are on several devices, or on the disk: as on a whole base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn

import tiny
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.footprint import training_footprint
from coterie.compute.train import Training
from coterie.compute.workplace import Workplace
from coterie.data.tasks import Classification, Generation
from coterie.nn.base import load_base
from coterie.nn.placement import Placement, device_of, is_offloaded
from coterie.nn.unloaded import shapes_alone, unloaded_base
from coterie.requests import Balance, LastRanks, Observe, Proximal, Score, Train
from coterie.types import Part
from workplaces import TOKENIZER, client_of, equal_bits, largest_difference, plain_bank, sgd

torch.set_num_threads(1)
DISK: dict[str, dict[str, int | str]] = {
    "llama": {
        "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    },
    "bert": {"bert.embeddings": "disk", "bert.encoder": "cpu", "bert.pooler": "disk", "classifier": "cpu"},
}  # fmt: skip


def task_of(arch: str) -> Classification | Generation:
    return Classification(TOKENIZER, 32) if arch in tiny.ENCODERS else Generation(TOKENIZER, 32, 6)


def workplace_on(folder: Path, arch: str, placing: Placement | None, checkpointing: bool, **settings: Any) -> Workplace:
    if not (folder / "config.json").exists():
        tiny.folder(folder, arch)
    kind = "classification" if arch in tiny.ENCODERS else "generation"
    base = load_base(str(folder), kind, placement=placing, gradient_checkpointing=checkpointing)
    return Workplace(base, task_of(arch), 0, **settings)


def answers(workplace: Workplace, bank: Any, **more: Any) -> list[Any]:
    """What a client gets of every kind of request."""
    client = client_of(workplace)
    compute = LocalCompute(workplace, client, 1)
    optim = sgd(3).model_copy(update={"clip": 0.1, "optimizer": "adamw"})
    observed = Observe(bank, "train", ("usage", "embeddings", "directions", "first_order"))
    requests = [Train(bank, frozenset(bank.tensors), optim, **more), Score([bank], "test", usage=True), observed]
    return [made for request in requests for made in answer_all([(compute, request)], print)]


SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "encoder": ("bert", {}, {}, {}),
    "decoder": ("llama", {}, {}, {}),
    "checkpointing": ("llama", {}, {}, {"checkpointing": True}),
    "chunks": ("llama", {}, {}, {"loss_chunk": 4}),
    "bfloat16": ("llama", {}, {}, {"precision": "bfloat16"}),
    "balance": ("llama", {"gate": "softmax", "experts": 3}, {"balance": Balance(0.1)}, {}),
    "by row": ("llama", {"gate": "similarity", "options": {"scale": 0.5}, "experts": 2, "slots": 1}, {}, {}),
    "dropout": ("llama", {"gate": "scaled_dot_product", "options": {"k": 1}, "experts": 2, "dropout": 0.3}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_with_parts_on_the_disk_every_answer_is_the_same(name: str, tmp_path: Path) -> None:
    arch, of_bank, more, settings = SETTINGS[name]
    plain, placed = (
        workplace_on(tmp_path, arch, placing, settings.get("checkpointing", False),
                     **{key: value for key, value in settings.items() if key != "checkpointing"})
        for placing in (None, Placement(DISK[arch]))
    )  # fmt: skip
    assert is_offloaded(placed.base.model)
    assert not is_offloaded(plain.base.model)
    assert placed.device == plain.device
    if settings.get("precision"):
        plain.base.hold_linears(torch.bfloat16)
        placed.base.hold_linears(torch.bfloat16)
    bank = plain_bank(plain, **of_bank)
    expected, found = answers(plain, bank, **more), answers(placed, bank, **more)
    assert equal_bits(expected[0].tensors, found[0].tensors)
    assert replace(expected[0], tensors={}) == replace(found[0], tensors={})
    assert expected[1:2] == found[1:2]
    assert expected[2].usage == found[2].usage
    assert equal_bits(expected[2].embeddings, found[2].embeddings)
    assert expected[2].importance == found[2].importance
    assert is_offloaded(placed.base.model), "the base is as it was"


def test_clients_that_share_passes_get_the_same(tmp_path: Path) -> None:
    made = []
    for placing in (None, Placement(DISK["llama"])):
        workplace = workplace_on(tmp_path, "llama", placing, False)
        banks = [plain_bank(workplace, experts=experts, gate="softmax") for experts in (2, 3)]
        requests = [
            (LocalCompute(workplace, client_of(workplace, f"c{i}"), 1), Train(bank, frozenset(bank.tensors), sgd(2)))
            for i, bank in enumerate(banks)
        ]
        made.append(answer_all(requests, print))
    assert len(made[0]) == 2
    for plain, placed in zip(*made, strict=True):
        assert equal_bits(plain.tensors, placed.tensors)


# two devices: tensors without numbers, which refuse to meet on different ones -----------------------------------------

HALVES: dict[str, list[str]] = {
    "llama": ["model.layers.1", "model.norm", "lm_head"],
    "bert": ["bert.encoder.layer.1", "bert.pooler", "classifier"],
}


def _to_second(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return send_to_device((args, kwargs), "meta")


def halved(folder: Path, arch: str, mode: Any, **settings: Any) -> Workplace:
    """A workplace whose base has its second half on a second device, as accelerate's hooks have it."""
    tiny.folder(folder, arch, **({} if arch == "bert" else {"tie_word_embeddings": False}))
    kind = "classification" if arch in tiny.ENCODERS else "generation"
    base = unloaded_base(str(folder), kind, mode, gradient_checkpointing=settings.pop("checkpointing", False))
    with mode:
        for part in map(base.model.get_submodule, HALVES[arch]):
            part.register_forward_pre_hook(_to_second, with_kwargs=True)
            for module in part.modules():
                module._hf_hook = SimpleNamespace(execution_device="meta")
                for name, value in [*module.named_parameters(recurse=False)]:
                    setattr(module, name, nn.Parameter(value.detach().to("meta"), requires_grad=False))
    base.model.register_forward_hook(lambda _, args, output: send_to_device(output, "cpu"))
    return Workplace(base, task_of(arch), 0, **settings)


CROSSING = {
    **{name: SETTINGS[name] for name in ("encoder", "decoder", "checkpointing", "chunks", "balance", "by row")},
    "terms": ("llama", {}, {"proximal": True, "last_ranks": LastRanks(0.1, 1)}, {}),
    "ranks": ("llama", {"gate": "softmax", "experts": 2, "rank": [2, 4]}, {}, {}),
}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", CROSSING)
def test_no_tensor_meets_one_of_another_device(name: str, together: int, tmp_path: Path) -> None:
    arch, of_bank, more, settings = CROSSING[name]
    mode = shapes_alone()
    workplace = halved(tmp_path, arch, mode, **settings)
    bank = plain_bank(workplace, **of_bank)
    keys = frozenset(bank.tensors)
    if more.get("proximal"):
        more = {**more, "proximal": Proximal(0.1, keys)}
    request, client = Train(bank, keys, sgd(1).model_copy(update={"clip": 1.0}), **more), client_of(workplace)
    trainings = []
    for number in range(together):
        made = Training(workplace, replace(client, info=replace(client.info, id=f"c{number}")), 1, request)
        made.steps, made.heads = made.steps[:1], made.heads[:1]
        trainings.append(made)
    used = training_footprint(trainings, mode)
    assert used.passes > 0
    devices = {p.device.type for t in trainings for p in t.layers.parameters.values()}
    assert devices == {"cpu", "meta"}
    for training in trainings:
        for key, parameter in training.layers.parameters.items():
            module = key.module.rpartition(".")[0] if key.part is Part.HEAD else key.module
            assert parameter.device == device_of(workplace.base.model.get_submodule(module))


# GPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("others", [["cuda:1"], ["cpu"], ["disk"]], ids=str)
def test_over_gpus_the_answers_are_those_of_one(others: list[str], arch: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < (2 if others == ["cuda:1"] else 1):
        pytest.skip(f"needs a GPU beside {others[0]}")
    moved = "bert.encoder" if arch == "bert" else "model.layers.1"
    parts: dict[str, int | str] = {**dict.fromkeys(DISK[arch], "cuda:0"), moved: others[0]}
    plain, placed = (
        workplace_on(tmp_path, arch, placing, checkpointing=True, precision="bfloat16", loss_chunk=4)
        for placing in (Placement(dict.fromkeys(parts, "cuda:0")), Placement(parts))
    )
    assert placed.device == plain.device == torch.device("cuda:0")
    bank = plain_bank(plain, gate="softmax", experts=2)
    expected, found = answers(plain, bank), answers(placed, bank)
    assert largest_difference(expected[0].tensors, found[0].tensors) < 1e-2
    assert found[1][0].loss == pytest.approx(expected[1][0].loss, rel=1e-2)


@pytest.mark.gpu
def test_max_memory_leaves_what_a_gpu_does_not_hold_on_the_cpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    placing = Placement("auto", {"cuda:0": "100KB", "cpu": "1GB"})
    workplace = workplace_on(tmp_path, "llama", placing, checkpointing=True)
    assert is_offloaded(workplace.base.model)
    assert workplace.device.type == "cuda"
    assert answers(workplace, plain_bank(workplace))[0].steps == 3
