"""What tells one base from another: a digest of its weights as its files hold them, by module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from coterie.nn.base import load_base
from coterie.nn.weights import digests
from coterie.types import CoterieError

MODULES = ["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"]


def test_bases_of_the_same_sizes_are_told_apart_and_the_same_base_is_not(tmp_path: Path) -> None:
    one = tiny.folder(tmp_path / "one", "llama")
    found = digests(str(one), MODULES)
    assert found.keys() == set(MODULES)
    assert len(set(found.values())) == 2
    assert digests(str(one), [f"model.{m}" for m in MODULES]) == {f"model.{m}": d for m, d in found.items()}
    file = one / "model.safetensors"
    tensors = load_file(file)
    name = f"model.{MODULES[1]}.weight"
    tensors[name] = tensors[name] + 0.01 * torch.outer(
        torch.ones(len(tensors[name])), tensors[name][0]
    )  # a merged LoRA
    save_file(tensors, file)
    assert [digests(str(one), MODULES)[m] == found[m] for m in MODULES] == [True, False]


def test_prefixes_may_differ_and_what_is_not_told_clearly_is_left_out(tmp_path: Path) -> None:
    rows, names = torch.arange(12.0).reshape(4, 3), ("h.0.q", "text.h.1.q", "image.h.1.q")
    save_file({f"{name}.weight": rows.clone() for name in names}, tmp_path / "a.safetensors")
    save_file({"decoder.h.2.q.weight": rows + 1}, tmp_path / "b.safetensors")
    found = digests(str(tmp_path), ["transformer.h.0.q", "h.0.q", "h.1.q", "text.h.1.q", "h.2.q", "h.3.q"])
    assert found.keys() == {"transformer.h.0.q", "h.0.q", "text.h.1.q", "h.2.q"}
    assert len(set(found.values())) == 2


def test_the_dtype_and_quantisation_in_memory_do_not_count(tmp_path: Path) -> None:
    folder = str(tiny.folder(tmp_path / "base", "llama"))
    specs = [load_base(folder, "generation", dtype=dtype).spec for dtype in (torch.float32, torch.bfloat16)]
    assert specs[0] == specs[1]
    assert all(target.weights for target in specs[0].targets)


def test_other_formats_tell_nothing_and_a_damaged_file_is_told(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "base", "llama")
    assert digests("no-such/model", MODULES) == {}
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert digests(str(folder), MODULES) == {}
    (folder / "model.safetensors").write_bytes(b"\x09" * 40)
    with pytest.raises(CoterieError, match="is damaged"):
        digests(str(folder), MODULES)
