"""Runs on a base whose parts are on several devices, from the config on, and what does not go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
import tiny
from coterie.artifacts.evaluate import open_client
from coterie.config.load import check_config, load_config
from coterie.experiment import run
from coterie.nn.base import load_base
from coterie.nn.placement import Placement
from coterie.types import CoterieError

torch.set_num_threads(1)
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def over(*devices: int | str) -> str:
    """A device map of the tiny Llama, in TOML."""
    return "{" + ", ".join(f'"{part}" = {json.dumps(where)}' for part, where in zip(PARTS, devices, strict=True)) + "}"


def exported(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def events(folder: Path, kind: str) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_with_parts_on_the_disk_ends_with_the_same_bits(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method="fedit")
    common = ["run.rounds=1", "task.generate=true", "task.max_new_tokens=4", "task.scores=['exact_match']"]
    placed = f"model.device_map={over('disk', 'cpu', 'cpu', 'disk', 'cpu', 'disk')}"
    run(load_config(path, common), tmp_path / "whole", root=tmp_path)
    run(load_config(path, [*common, placed, "engine.device='auto'"]), tmp_path / "parts", root=tmp_path)
    whole = exported(tmp_path / "whole")
    assert len(whole) > 5
    assert whole == exported(tmp_path / "parts")
    assert any("holds them until its end" in str(event) for event in events(tmp_path / "parts", "note"))
    assert not is_meta(open_client(tmp_path / "parts", "size-0", device="cpu"))
    assert is_meta(open_client(tmp_path / "parts", "size-0"))


def is_meta(client: Any) -> bool:
    return any(p.is_meta for p in client.workplace.base.model.parameters())


def test_memory_limits_decide_what_is_on_the_disk(tmp_path: Path) -> None:
    path = sites.config(tmp_path, "llama", method="fedit")
    common = ["run.rounds=1", "engine.device='auto'", "engine.clients_per_batch=2", "model.gradient_checkpointing=true"]
    placing = ["model.device_map='auto'", "model.max_memory={cpu = '90KB'}"]
    cache: dict[str, Any] = {}
    run(load_config(path, [*common, *placing]), tmp_path / "parts", root=tmp_path, cache=cache)
    ((base,),) = cache.values()
    offloaded = [name for name, p in base.model.named_parameters() if p.is_meta]
    assert 0 < len(offloaded) < len(list(base.model.parameters()))
    run(load_config(path, common), tmp_path / "whole", root=tmp_path)
    assert exported(tmp_path / "whole") == exported(tmp_path / "parts")
    assert not any("holds them" in str(event) for event in events(tmp_path / "parts", "note"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"device_map": "best"}}, "device_map"),
        ({"model": {"device_map": {}}}, "name a device for each part"),
        ({"model": {"max_memory": {"cpu": "1GB"}}}, 'max_memory counts only .* set device_map = "auto"'),
        ({"model": {"device_map": "auto", "max_memory": {"cpu": "much"}}}, "give each size as in"),
        ({"engine": {"device": ["cpu", "cpu"]}}, r"\[engine\] device = .* leave one out"),
        ({"engine": {"compile": True}}, r"\[engine\] compile does not work .* leave one out"),
        ({"engine": {"clients_per_batch": "auto"}}, "measures the memory of one device; give a number"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = {"data": {"folder": "clients"}, "model": {"device_map": "auto"}}
    with pytest.raises(CoterieError, match=message):
        check_config({**raw, **changes}).make_method(tmp_path)


TIED = {"model": "cpu", "lm_head": "cpu"}  # which share the embeddings


@pytest.mark.parametrize(
    ("arch", "device_map", "message"),
    [
        ("llama", {"": "cuda:99"}, "device_map names 'cuda:99'; this machine has cpu"),
        ("llama", {**TIED, "lm_head": "disk"}, "'model.embed_tokens.weight' on 'cpu' and 'lm_head.weight' on 'disk'"),
        ("llama", {**TIED, "model.norms": "disk"}, "names 'model.norms', which this base does not have"),
        ("llama", {"model.norm": "cpu", "model.layers": "disk"}, "names no device for 'model.embed_tokens.weight'"),
        ("bert", {"bert": "cpu", "classifier": "disk"}, "leaves 'classifier.bias' on the disk, but the files"),
    ],
)
def test_a_map_that_does_not_fit_says_so(arch: str, device_map: Any, message: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path, arch)
    with pytest.raises(CoterieError, match=message):
        load_base(str(tmp_path), "classification" if arch == "bert" else "generation", placement=Placement(device_map))
