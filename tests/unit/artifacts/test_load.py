"""``coterie.load`` in every way that a base is loaded: half precision, quantised, over devices; and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import bundles
import coterie
import tiny

TEXTS = ["a b c", "one two three four five", "x"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.finished(tmp_path_factory.mktemp("generator"), "generation")


def prompts(north: Any) -> dict[str, torch.Tensor]:
    north.tokenizer.padding_side = "left"
    return dict(north.tokenizer(TEXTS, return_tensors="pt", padding=True))


@pytest.mark.parametrize("gate", ["slot_top_k", "softmax", "scaled_dot_product"])
def test_generation_with_a_cache_is_generation_without(gate: str, tmp_path: Path) -> None:
    options = {"scaled_dot_product": {"k": 2}}.get(gate)
    folder = bundles.finished(tmp_path, "generation", gate=gate, options=options)
    north = coterie.load(folder, "north")
    written = [
        north.model.generate(**prompts(north), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*written)
    assert written[0].shape[1] > prompts(north)["input_ids"].shape[1]


def test_a_base_in_half_precision_gives_nearly_the_same_logits(generator: Path) -> None:
    exact, half = (coterie.load(generator, "north", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = (m.model(**prompts(m)).logits.float().log_softmax(-1) for m in (exact, half))
    real = prompts(exact)["attention_mask"].bool()
    assert 0 < float((expected - found)[real].abs().mean()) < 0.1


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_base_carries_the_bank(how: Any, tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path, "generation", hidden_size=64, intermediate_size=128)
    north = coterie.load(folder, "north", quantize=how)
    assert any("bit" in type(module).__name__ for module in north.model.modules())
    write = pipeline("text-generation", model=north.model, tokenizer=north.tokenizer)
    (found,) = write("one two", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("one two")
    assert len(north.predict([{"prompt": text} for text in TEXTS])) == len(TEXTS)


PLACES = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}


@pytest.mark.parametrize(
    "how", ["auto", {**{f"model.{part}": place for part, place in PLACES.items()}, "lm_head": "cpu"}]
)
def test_a_device_map_changes_no_logits(how: Any, generator: Path) -> None:
    plain, mapped = coterie.load(generator, "north"), coterie.load(generator, "north", device_map=how)
    away = {name for name, p in mapped.model.named_parameters() if p.device.type == "meta"}
    assert bool(away) == (how != "auto")
    assert {tuple(name.split(".")[:3]) for name in away} <= {("model", "layers", "1")}
    with torch.no_grad():
        assert torch.equal(mapped.model(**prompts(plain)).logits, plain.model(**prompts(plain)).logits)


def test_a_classifier_takes_a_device_map_and_a_pipeline(tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path)
    north = coterie.load(folder, "north", device_map="auto", dtype=torch.bfloat16)
    classify = pipeline("text-classification", model=north.model, tokenizer=north.tokenizer)
    assert {found["label"] for found in classify(TEXTS)} <= set(bundles.LABELS)
    assert tiny.HIDDEN == 32
