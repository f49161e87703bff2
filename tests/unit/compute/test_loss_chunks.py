"""Losses with the logits of some tokens at a time: the same losses and gradients, and no tensor of all logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
)

import tiny
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.tasks import MultipleChoice
from coterie.nn.split_head import split_head, token_losses
from coterie.requests import Observe, Score, Train
from coterie.types import Bank, GateSpec
from workplaces import TOKENIZER, client_of, largest_difference, make_workplace, plain_bank, sgd, train

torch.set_num_threads(1)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
MORE: dict[str, Any] = {"intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
CONFIGS: dict[str, PretrainedConfig] = {
    "soft capping": Gemma2Config(**SIZES, **MORE, head_dim=8, final_logit_softcapping=3.0),
    "scaled": GraniteConfig(**SIZES, **MORE, logits_scaling=4.0),
    "biased": PhiConfig(**SIZES, **MORE),
    "experts": MixtralConfig(**SIZES, **MORE, num_local_experts=2),
    "projected": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8, pad_token_id=0, max_position_embeddings=64),
    "no positions": BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=300, pad_token_id=0),
}


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, each.numel()) if isinstance(each, Tensor) else self.numel
        return out


def workplace_of(arch: str, chunk: Any, **settings: Any) -> Workplace:
    return make_workplace(arch, loss_chunk=chunk, **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_is_cut_whatever_its_head_is(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    if (head := model.get_output_embeddings()).bias is not None:
        head.bias.normal_()
    cut, inputs = split_head(model), tiny.batch()
    assert cut is not None
    hidden = cut.hidden(model, inputs)
    whole = model(**inputs).logits
    assert torch.allclose(cut.logits(model, hidden.flatten(0, 1)), whole.flatten(0, 1), atol=1e-6)
    assert type(model.get_submodule(cut.body)).__name__ != "_Body"


def test_a_head_that_mixes_tokens_is_not_cut() -> None:
    model = tiny.model("llama", "generation")
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits - logits.mean(1, keepdim=True))
    assert split_head(model) is None


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_losses_and_gradients_of_tokens_are_those_of_whole_logits(chunk: int) -> None:
    head = nn.Linear(8, 50).double().requires_grad_(False)
    hidden, labels = torch.randn(7, 8, dtype=torch.float64, requires_grad=True), torch.randint(50, (7,))
    weight = torch.rand(7, dtype=torch.float64)
    whole = nn.functional.cross_entropy(head(hidden), labels, reduction="none")
    (expected,) = torch.autograd.grad((weight * whole).sum(), hidden)
    losses = token_losses(hidden, labels, head, chunk)
    (gradient,) = torch.autograd.grad((weight * losses).sum(), hidden)
    assert torch.allclose(losses, whole, atol=1e-13)
    assert torch.allclose(gradient, expected, atol=1e-13)


@pytest.mark.parametrize("arch", tiny.DECODERS)
def test_training_is_the_same_to_1e_12(arch: str) -> None:
    whole, parts = workplace_of(arch, 0), workplace_of(arch, 5)
    bank = plain_bank(whole, dropout=0.2, experts=3, gate="softmax")
    one, other = (train(each, bank, sgd(2, accumulate=2)) for each in (whole, parts))
    assert largest_difference(one.tensors, bank.tensors) > 1e-4
    assert largest_difference(one.tensors, other.tensors) < 1e-12
    assert other.loss == pytest.approx(one.loss, abs=1e-12)
    assert not parts.notes


def test_training_with_a_gate_by_row_and_gradient_checkpointing_is_the_same() -> None:
    whole, parts = workplace_of("llama", 0), workplace_of("llama", 5)
    for each in (whole, parts):
        each.base.model.gradient_checkpointing_enable({"use_reentrant": False})
        each.base.model.train()
    made = plain_bank(whole, experts=2, gate="similarity", slots=1)
    bank = Bank(made.tensors, GateSpec("similarity", {"scale": 0.5}), made.scaling)
    one, other = (train(each, bank, sgd(2)) for each in (whole, parts))
    assert largest_difference(one.tensors, other.tensors) < 1e-12


def test_many_clients_in_a_pass_get_the_same() -> None:
    results = []
    for chunk in (0, 5):
        workplace = workplace_of("llama", chunk)
        bank = plain_bank(workplace, experts=2, gate="softmax")
        clients = [client_of(workplace, name, number) for name, number in (("north", 8), ("south", 5))]
        computes = [LocalCompute(workplace, client, 1) for client in clients]
        trains = [(compute, Train(bank, frozenset(bank.tensors), sgd(2))) for compute in computes]
        scores = [(compute, Score([bank], "test", usage=True)) for compute in computes]
        results.append([*answer_all(trains, print), *answer_all(scores, print)])
    (*one, score), (*other, same) = results
    assert all(largest_difference(a.tensors, b.tensors) < 1e-12 for a, b in zip(one[:2], other[:2], strict=True))
    assert same[0].loss == pytest.approx(score[0].loss, abs=1e-12)
    assert same[0].observed.usage == score[0].observed.usage


def test_choices_and_the_importance_of_experts_are_the_same() -> None:
    from test_choice import LABELS, SHARED
    from test_choice import client_of as choosing

    made = []
    for chunk in (0, 4):
        workplace = replace(workplace_of("llama", chunk), task=MultipleChoice(TOKENIZER, 32))
        bank = plain_bank(workplace, experts=3, gate="top_k", options={"k": 2})
        compute = LocalCompute(workplace, choosing(SHARED, LABELS), 1)
        (scored,) = compute.score(Score([bank], "test"))
        made.append((scored, compute.observe(Observe(bank, "test", ("first_order",))).importance["first_order"]))
    (one, importance), (other, same) = made
    assert other.metrics == one.metrics
    assert other.loss == pytest.approx(one.loss, abs=1e-12)
    assert importance
    assert all(same[name] == pytest.approx(value, rel=1e-10) for name, value in importance.items())


def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    """8 rows of up to 32 tokens, of which at most 5 have logits at a time."""
    sizes, vocabulary, hidden = {}, tiny.VOCABULARY, tiny.HIDDEN
    for chunk in (0, 5):
        workplace = workplace_of("llama", chunk)
        bank = plain_bank(workplace)
        compute = LocalCompute(workplace, client_of(workplace), 1)
        with Largest() as largest:
            compute.train(Train(bank, frozenset(bank.tensors), sgd(1)))
        sizes["train", chunk] = largest.numel
        with Largest() as largest:
            compute.score(Score([bank], "test"))
        sizes["score", chunk] = largest.numel
    assert sizes["train", 0] >= 8 * 20 * vocabulary
    assert sizes["train", 5] < 8 * 32 * 2 * hidden < sizes["train", 0] / 2  # the MLP's 48 numbers a token are the most
    assert sizes["score", 5] < sizes["score", 0] / 2


def test_auto_takes_chunks_where_logits_would_be_large() -> None:
    workplace = make_workplace("llama", loss_chunk="auto")
    assert workplace.chunk(4096, 128_000) == 131  # 64 MiB
    assert workplace.chunk(128, 30_000) == 0  # 15 MiB in all
    assert replace(workplace, loss_chunk=7).chunk(128, 30_000) == 7


def test_a_head_that_is_not_cut_is_said_once() -> None:
    workplace = workplace_of("llama", 5)
    workplace.base = replace(workplace.base, split_head=None)
    train(workplace, plain_bank(workplace), sgd(2))
    assert workplace.notes == [
        "the model's logits are computed at once, not in chunks ([engine] loss_chunk): its body and its head cannot be "
        "told apart"
    ]


def test_a_bank_on_the_head_keeps_whole_logits() -> None:
    results = []
    for chunk in (0, 5):
        workplace = workplace_of("gpt2", chunk)
        over = tiny.targets(workplace.base.model, ("lm_head", "c_attn"))
        bank = tiny.bank(over, dtype=torch.float64, dropout=0.2)
        results.append(train(workplace, bank, sgd(1)))
    assert largest_difference(results[0].tensors, results[1].tensors) == 0
    assert workplace.notes[0].endswith("a bank adapts it")
