"""A bank on a base of 4-bit and 8-bit Linears (bitsandbytes has both for CPUs): the bank trains, the bytes stay."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.nn import pretrained
from coterie.nn.attach import attached
from coterie.nn.base import Base, load_base
from coterie.nn.placement import Placement
from coterie.nn.spec import linear_sizes
from coterie.types import NO_EXPERT, Bank, CoterieError, Key

torch.set_num_threads(1)

HIDDEN = 64  # NF4 packs blocks of 64


def quantised(
    path: Path, kind: Any, arch: str = "llama", dtype: torch.dtype = torch.float32, how: Literal["nf4", "int8"] = "nf4"
) -> Base:
    return load_base(str(folder(path, arch)), kind, quantize=how, dtype=dtype)


def folder(path: Path, arch: str) -> Path:
    return tiny.folder(path / "model", arch, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN)


def bank_for(base: Base, **more: Any) -> tuple[Bank, set[Key]]:
    bank = tiny.bank(base.spec.targets, 3, gate="slot_top_k", options={"own": 1}, **more)
    head = tiny.head(base.model, 3) if base.spec.head else {}
    own = {key for key in bank.tensors if key.expert in (1, NO_EXPERT)} | set(head)
    return Bank({**bank.tensors, **head}, bank.gate, bank.scaling, bank.dropout), own


def content(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_linears_are_quantised_and_found(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    base = quantised(tmp_path, "generation")
    assert len(base.spec.targets) == 4
    assert {(t.d_in, t.d_out) for t in base.spec.targets} == {(64, 64), (64, 32)}
    for target in base.spec.targets:
        module = base.model.get_submodule(target.name)
        assert isinstance(module, Linear4bit)
        assert module.weight.dtype == torch.uint8
        assert linear_sizes(module) == (target.d_in, target.d_out)
    plain = load_base(base.path, "generation")
    inputs = tiny.batch()
    ours, theirs = (made.model(**inputs).logits.flatten() for made in (base, plain))
    assert 0.7 < float(torch.cosine_similarity(ours, theirs, dim=0)) < 0.9999


@pytest.mark.parametrize("arch", ["llama", "roberta"])
def test_the_linears_are_held_in_8_bits_and_found(arch: str, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear8bitLt

    kind = "generation" if arch == "llama" else "classification"
    base = quantised(tmp_path, kind, arch, how="int8")
    for target in base.spec.targets:
        module = base.model.get_submodule(target.name)
        assert isinstance(module, Linear8bitLt)
        assert module.weight.dtype == torch.int8
        assert linear_sizes(module) == (target.d_in, target.d_out)
    assert len(base.spec.targets) == 4
    assert all(base.model.get_parameter(p.name).dtype == torch.float32 for p in base.spec.head)
    plain = load_base(base.path, kind)
    ours, theirs = (made.model(**tiny.batch()).logits.flatten() for made in (base, plain))
    assert 0.95 < float(torch.cosine_similarity(ours, theirs, dim=0)) < 1 - 1e-7


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_training_on_it(kind: Any, dtype: torch.dtype, how: Any, tmp_path: Path) -> None:
    base = quantised(tmp_path, kind, dtype=dtype, how=how)
    bank, own = bank_for(base, dropout=0.1)
    before, start = content(base.model), base.model(**tiny.batch()).logits
    with attached(base.model, bank_for(base, zero_b=True)[0] if kind == "generation" else Bank({})):
        assert torch.equal(base.model(**tiny.batch()).logits, start)
    with attached(base.model, bank, own) as handle:
        optimiser = torch.optim.AdamW(handle.parameters.values(), lr=0.02)
        losses = []
        for step in range(6):
            handle.now.training, handle.now.seed = True, step
            logits = base.model(**tiny.batch()).logits.float()
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), torch.ones(logits.shape[:-1].numel(), dtype=torch.long)
            )
            loss.backward()
            for key, parameter in handle.parameters.items():
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                assert bool(parameter.grad.isfinite().all())
                assert bool(parameter.grad.any()), key
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert handle.parameters.keys() == own
    after = content(base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = {"nf4": torch.uint8, "int8": torch.int8}[how]
    assert sum(value.dtype == stored for value in after.values()) >= 14
    assert torch.equal(base.model(**tiny.batch()).logits, start)


def test_gradients_are_those_of_a_base_of_the_dequantised_weights(tmp_path: Path) -> None:
    """Through every layer above: a 4-bit product without a gradient (a shortcut of bitsandbytes on some processors)
    would leave zeros, or wrong numbers, in all layers but the last."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base = quantised(tmp_path, "generation")
    plain = load_base(base.path, "generation")
    for name, module in base.model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.model.get_submodule(name).weight.data.copy_(weight)
    grads = []
    for one in (base, plain):
        bank, own = bank_for(one)
        with torch.no_grad():
            one.model(**tiny.batch())  # evaluation first: that is where the shortcut is taken
        with attached(one.model, bank, own) as handle:
            one.model(**tiny.batch()).logits.logsumexp(-1).sum().backward()
            grads.append({key: p.grad for key, p in handle.parameters.items()})
    for key, grad in grads[1].items():
        torch.testing.assert_close(grads[0][key], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))
    assert len(grads[0]) == 3 * len(base.spec.targets)


def test_gradients_on_8_bits_come_near_those_on_the_plain_base(tmp_path: Path) -> None:
    """Near only: the inputs of an 8-bit product are rounded too."""
    base = quantised(tmp_path, "generation", how="int8")
    grads = []
    for one in (base, load_base(base.path, "generation")):
        bank = tiny.bank(one.spec.targets)
        with attached(one.model, bank, set(bank.tensors)) as handle:
            one.model(**tiny.batch()).logits.logsumexp(-1).sum().backward()
            grads.append({key: p.grad.flatten() for key, p in handle.parameters.items()})
    assert len(grads[0]) == 2 * len(base.spec.targets)
    for key, grad in grads[1].items():
        assert float(torch.cosine_similarity(grads[0][key], grad, dim=0)) > 0.95, key


def test_the_bank_adds_the_same_as_on_a_base_that_is_not_quantised(tmp_path: Path) -> None:
    base = quantised(tmp_path, "generation")
    plain = load_base(base.path, "generation")
    name = base.spec.targets[0].name
    bank, x = bank_for(base)[0], torch.ones(1, 3, HIDDEN)
    added = []
    for one in (base, plain):
        module = one.model.get_submodule(name)
        without = module(x)
        with attached(one.model, bank):
            added.append(module(x) - without)
    torch.testing.assert_close(added[0], added[1], rtol=1e-4, atol=1e-4)
    assert bool(added[0].any())


@pytest.mark.parametrize("arch", ["llama", "roberta", "bert"])
def test_the_head_is_not_quantised(arch: str, tmp_path: Path) -> None:
    """Left alone, transformers would quantise RoBERTa's inner head layer, which every client trains."""
    base = quantised(tmp_path, "classification", arch)
    for parameter in base.spec.head:
        assert base.model.get_parameter(parameter.name).dtype == torch.float32
        assert parameter.shape[-1] in (HIDDEN, -1)
    with attached(base.model, *bank_for(base)):
        assert base.model(**tiny.batch()).logits.shape == (3, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(tmp_path: Path) -> None:
    path, found = folder(tmp_path, "llama"), []
    for checkpointing in (False, True):
        base = load_base(str(path), "generation", quantize="nf4", gradient_checkpointing=checkpointing)
        bank, own = bank_for(base, dropout=0.2)
        with attached(base.model, bank, own) as handle:
            handle.now.training = True
            base.model(**tiny.batch(), use_cache=False).logits.logsumexp(-1).sum().backward()
            found.append({key: p.grad for key, p in handle.parameters.items()})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-6)


def test_without_bitsandbytes_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(CoterieError, match=r"quantize = 'nf4' needs bitsandbytes: pip install bitsandbytes$"):
        quantised(tmp_path, "generation")


@pytest.mark.parametrize("fault", [RuntimeError("none of the devices is supported\nSee the docs."), ImportError()])
def test_a_bitsandbytes_that_will_not_do_is_a_fault_in_one_line(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too old a version, or one without a backend for this machine."""

    def refuse(**options: Any) -> None:
        raise fault

    monkeypatch.setattr("transformers.integrations.validate_bnb_backend_availability", refuse)
    reason = str(fault).partition("\n")[0] or "ImportError"
    with pytest.raises(CoterieError, match=f"cannot load the model '{tmp_path}/model' quantised: {reason}$"):
        quantised(tmp_path, "generation", how="int8")


OFF = "does not work with parts on the CPU or the disk"
SMALLER = r"raise max_memory or add a GPU{}, or leave quantize out$"


@pytest.mark.parametrize(
    ("how", "placement", "message"),
    [
        ("nf4", Placement({"": "disk"}), f"'nf4' {OFF}, and device_map has 'all of it' on 'disk'; name GPUs for all"),
        ("int8", Placement({"model": "cpu", "lm_head": "disk"}), f"'int8' {OFF}, and device_map has 'model' on 'cpu'"),
        ("nf4", Placement("auto", {"cpu": "90KB"}), f"'nf4' {OFF}: the base takes .* and 79.1 KiB are free for it, so"),
        ("int8", Placement("auto", {"cpu": 9000}), SMALLER.format(', set quantize = "nf4"')),
    ],
)
def test_parts_that_bitsandbytes_cannot_compute_are_refused_before_the_load(
    how: Literal["nf4", "int8"], placement: Placement, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any, **options: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(pretrained, "_model", unwanted)
    path = tiny.folder(tmp_path, "llama", hidden_size=HIDDEN, tie_word_embeddings=False)
    with pytest.raises(CoterieError, match=message):
        load_base(str(path), "generation", quantize=how, placement=placement)


def test_a_placement_that_transformers_finds_too_small_is_refused_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are placed whole, so a base may need more room than its bytes."""
    monkeypatch.setattr(pretrained, "check_parts", lambda *args: None)
    placement = Placement("auto", {"cpu": "90KB"})
    with pytest.raises(CoterieError, match=f"'nf4' {OFF}: the base does not fit its devices, so that"):
        load_base(str(folder(tmp_path, "llama")), "generation", quantize="nf4", placement=placement)


def test_a_quantised_base_may_be_on_the_cpu_alone(tmp_path: Path) -> None:
    path = str(folder(tmp_path, "llama"))
    for placement in (Placement({"": "cpu"}), Placement("auto", {"cpu": "1GB"})):
        assert load_base(path, "generation", quantize="nf4", placement=placement).device == torch.device("cpu")
