"""The plan of a run against what its largest step takes, counted tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tiny
from coterie.cli.doctor import planned
from coterie.compute.client import LocalCompute
from coterie.compute.footprint import LiveBytes
from coterie.compute.loading import workplaces
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.engines import plan as plans
from coterie.engines.batch_size import first_request
from coterie.engines.plan import Plan, Speed, plan
from coterie.requests import Score
from coterie.types import CoterieError

torch.set_num_threads(1)
WORDS = "one two three four five six seven eight nine ten"
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "decoder": ("llama", {"hidden_size": 64, "num_hidden_layers": 3}, {}),
    "chunks": ("llama", {"hidden_size": 64}, {"engine": {"loss_chunk": 8}}),
    "bfloat16": ("llama", {"hidden_size": 64}, {"engine": {"precision": "bfloat16"}}),
    "packed": ("llama", {"hidden_size": 64}, {"train": {"packing": True}}),
    "checkpointing": (
        "llama", {"hidden_size": 64, "num_hidden_layers": 4}, {"model": {"gradient_checkpointing": True}},
    ),
    "encoder": ("bert", {"hidden_size": 64, "num_hidden_layers": 3}, {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "measured_speed", lambda device, precision, clock: Speed(1e9, 1e9, 1e-5))


def federation(path: Path, arch: str) -> None:
    for name, longest in (("north", 10), ("south", 4)):
        (path / "clients" / name).mkdir(parents=True)
        for split in ("train", "test"):
            texts = [f"{split} {i} {' '.join(WORDS.split()[: 2 + i % longest])}" for i in range(12)]
            rows = [
                {"text": text, "label": i % 2} if arch == "bert" else {"prompt": text, "completion": text[::-1]}
                for i, text in enumerate(texts)
            ]
            (path / "clients" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def config_of(path: Path, arch: str, **sections: Any) -> Config:
    made: dict[str, Any] = {
        "model": {"path": str(path / "model"), "max_length": 96}, "data": {"folder": "clients"},
        "task": {"kind": "classification" if arch == "bert" else "generation"}, "method": {"name": "fedit"},
        "train": {"batch_size": 8, "steps": 1}, "engine": {"device": "cpu"},
    }  # fmt: skip
    for name, keys in sections.items():
        made[name] = {**made.get(name, {}), **keys}
    return check_config(made)


def measured(config: Config, root: Path, made: Plan) -> int:
    """The bytes at the peak of training and of evaluation, of all tensors made after the base was loaded."""
    clients = load_data(config.data, config.task.kind, 0, root).clients
    (workplace,) = workplaces(config, root, {})
    method, infos = config.make_method(root), [client.info for client in clients]
    instructions = method.configure(method.init(workplace.base.spec, infos), infos, 1)
    client = next(client for client in clients if client.info.id == "north")
    ins, mine = instructions["north"], method.begin(workplace.base.spec, client.info)
    request = first_request(
        method.client(ins, client.info, mine), lambda: method.bank(ins, client.info, mine), config.train
    )
    longest = sorted(workplace.examples(client, "train"), key=lambda e: -len(e.ids))[: config.train.batch_size]
    workplace.cache["north", "train"] = longest
    compute = LocalCompute(workplace, client, 1)
    with LiveBytes() as live:
        compute.train(request)
        compute.score(Score([request.bank], "test"))
    assert (made.rows, made.tokens) == (len(longest), len(longest[0].ids))
    return live.peak + sum(tensor.nbytes for tensor in request.bank.tensors.values())


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_is_within_a_fifth_of_what_a_step_takes(name: str, tmp_path: Path) -> None:
    arch, sizes, sections = SIZES[name]
    federation(tmp_path, arch)
    tiny.folder(tmp_path / "model", arch, **sizes)
    config = config_of(tmp_path, arch, **sections)
    made = plan(config, tmp_path)
    assert made.step - made.gaps == pytest.approx(measured(config, tmp_path, made), rel=0.2)
    model = workplaces(config, tmp_path, {})[0].base.model
    assert made.base == pytest.approx(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), rel=0.02)
    assert made.seconds > 0


def test_what_does_not_fit_comes_with_advice_and_the_largest_part_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation(tmp_path, "llama")
    tiny.folder(tmp_path / "model", "llama")
    config = config_of(tmp_path, "llama")
    assert plan(config, tmp_path).advice == ()
    monkeypatch.setattr(plans, "_memory", lambda device: 1000)
    made = plan(config, tmp_path)
    assert not made.fits
    assert made.activations > made.base
    assert made.advice[0].startswith("set [model] gradient_checkpointing = true, or set [train] batch_size = 4")
    assert 'set [model] dtype = "bfloat16"' in made.advice


def test_the_doctor_prints_the_parts(tmp_path: Path) -> None:
    federation(tmp_path, "llama")
    tiny.folder(tmp_path / "model", "llama")
    (tmp_path / "run.toml").write_text(
        '[model]\npath = "model"\n[data]\nfolder = "clients"\n[task]\nkind = "generation"\n[engine]\ndevice = "cpu"\n'
        '[method]\nname = "fedit"\n'
    )
    checks = {check.name: check for check in planned(tmp_path / "run.toml")}
    assert list(checks) == [
        "Python and its libraries", "base", "banks and gradients", "optimiser", "activations", "logits and the loss",
        "gaps between them", "the clients' replies", "memory in all", "a round",
    ]  # fmt: skip
    placed = (tmp_path / "run.toml").read_text().replace('device = "cpu"\n', "")
    (tmp_path / "placed.toml").write_text(placed.replace("[data]", 'device_map = {"" = "disk"}\n[data]'))
    assert "in the memory of cpu" in next(c.value for c in planned(tmp_path / "placed.toml") if c.name == "device_map")
    assert checks["memory in all"].ok == (psutil.virtual_memory().available > 2**29)
    run = (tmp_path / "run.toml").read_text() + '[run]\nexport = "last"\n[privacy]\nunit = "client"\nclip = 0.1\n'
    (tmp_path / "private.toml").write_text(run + "epsilon = 60.0\n")
    private = planned(tmp_path / "private.toml")[-1]
    assert (private.name, private.ok) == ("privacy", False)
    assert "at delta 1e-05 after all rounds" in private.value
    assert "epsilon = 60 protects nobody" in private.fix
    (tmp_path / "private.toml").write_text(run + "noise_multiplier = 0.01\n")
    with pytest.raises(CoterieError, match=r"noise_multiplier = 0\.01 would cost epsilon = "):
        planned(tmp_path / "private.toml")


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"task": {"objective": "dpo"}}, "objective = dpo cannot be planned yet"),
        (
            {"privacy": {"unit": "example", "clip": 1.0, "noise_multiplier": 1.0}, "lora": {"dropout": 0.0}},
            r'\[privacy\] unit = "example" cannot be planned: .* plan it without \[privacy\]',
        ),
    ],
)
def test_what_cannot_be_planned_says_what_to_plan_instead(sections: dict[str, Any], why: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama", **sections)
    with pytest.raises(CoterieError, match=why):
        plan(config, tmp_path)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_a_quantised_base_with_parts_on_the_disk_is_refused(device_map: dict[str, str], tmp_path: Path) -> None:
    federation(tmp_path, "llama")
    tiny.folder(tmp_path / "model", "llama", tie_word_embeddings=False)
    placed = {"device_map": device_map, "quantize": "nf4"}
    config = config_of(tmp_path, "llama", engine={"device": "auto"}, model=placed)
    with pytest.raises(CoterieError, match="quantize = 'nf4' does not work with parts on the CPU or the disk"):
        plan(config, tmp_path)


@pytest.mark.parametrize(
    ("device_map", "why"),
    [
        ({"model": "cpu", "head": "cpu"}, "device_map names 'head', which this base does not have; remove it"),
        ({"model": "cpu", "lm_head": "disk"}, "they are the same weights; name one device for both"),
    ],
)
def test_a_device_map_that_does_not_fit_the_base_is_refused(
    device_map: dict[str, str], why: str, tmp_path: Path
) -> None:
    federation(tmp_path, "llama")
    tiny.folder(tmp_path / "model", "llama")
    config = config_of(tmp_path, "llama", engine={"device": "auto"}, model={"device_map": device_map})
    with pytest.raises(CoterieError, match=why):
        plan(config, tmp_path)
