"""Operations of training are counted from shapes and tokens, and reach the summary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import short_runs
from coterie.compute.flops import active_flops, training_flops
from coterie.engines.checks import fault_of
from coterie.methods.parts import statistics
from coterie.requests import Train, Trained
from coterie.types import NO_EXPERT, SHARED, Bank, GateSpec, Key, Part, Reply

A, B, ROUTER = Key("q", 0, Part.A), Key("q", 0, Part.B), Key("q", NO_EXPERT, Part.ROUTER)
HEAD = Key("score", NO_EXPERT, Part.HEAD)


def test_a_matrix_costs_4_operations_a_number_and_6_where_it_trains() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    shapes = {A: (2, 4), B: (3, 2), ROUTER: (5, 4), HEAD: (2, 3)}
    bank = Bank({key: torch.zeros(shape) for key, shape in shapes.items()})
    for trainable, more in (((), 0), ((B,), 6), ((A, B, HEAD), 14)):
        request = Train(bank, frozenset(trainable), short_runs.OPTIM)
        assert training_flops(model, request) == 4 * (12 + 8 + 6 + 20) + 2 * more


GATES = {
    "constant": (GateSpec(), 1, 1),
    "top_k": (GateSpec("top_k", {"k": 8}, {"q": {"k": 1}}), 4, 4),  # the module's own k counts
    "more than there are": (GateSpec("top_k", {"k": 9}), 1, 1),
    "all scores need A": (GateSpec("scaled_dot_product", {"k": 2}), 1, 2),
    "the gradient reaches all": (GateSpec("signed", {"k": 1}), 1, 1),
}


@pytest.mark.parametrize(("gate", "a", "b"), GATES.values(), ids=GATES)
def test_experts_that_a_token_does_not_use_are_left_out_of_the_active_count(gate: GateSpec, a: int, b: int) -> None:
    """Of four experts, A and B count for one in ``a`` and one in ``b`` tokens; router and shared expert for all."""
    model = nn.Sequential(nn.Linear(4, 3))
    bank = {Key("q", e, part): torch.zeros(8) for e in range(4) for part in (Part.A, Part.B)}
    rest = {ROUTER: torch.zeros(5, 4), Key("q", SHARED, Part.A): torch.zeros(7)}
    request = Train(Bank({**bank, **rest}, gate), frozenset([ROUTER]), short_runs.OPTIM)
    assert training_flops(model, request) == 4 * (12 + 32 + 32 + 20 + 7) + 2 * 20
    assert active_flops(model, request) == 4 * (12 + 32 // a + 32 // b + 20 + 7) + 2 * 20


MIXTURES: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_token_is_multiplied_with_the_experts_of_the_base_that_it_is_routed_to(kind: str) -> None:
    """The count is that of the products that torch sees in a forward pass; those of attention are no mm."""
    config = CONFIG_MAPPING[kind](**SIZES, **MIXTURES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    assert any(p.ndim == 3 for p in model.parameters())
    seen = FlopCounterMode(display=False)
    with seen, torch.no_grad():
        model(torch.arange(14).reshape(2, 7) + 1, use_cache=False)
    products = sum(n for op, n in seen.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    nothing = Train(Bank({}), frozenset(), short_runs.OPTIM)
    assert training_flops(model, nothing) == 4 * products / 2 / 14


def test_experts_that_all_tokens_pass_count_in_full_and_a_convolution_is_none() -> None:
    class All(nn.Module):
        num_experts = 4

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    nothing = Train(Bank({}), frozenset(), short_runs.OPTIM)
    assert training_flops(nn.Sequential(All(), nn.Conv1d(4, 4, 3)), nothing) == 4 * 24


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
    assert "gflop_active" not in statistics(Trained({}, 1.0, 1, 1, 1, 0.0, 7, 7))
    assert statistics(Trained({}, 1.0, 1, 1, 1, 0.0, 7, 5))["gflop_active"] == 5e-9
    for wrong in (-1.0, "many", 1e16, float("nan")):
        for name in ("gflop", "gflop_active"):
            assert fault_of(Reply({}, 1, {name: wrong}), {}, 1.0, 1) is not None
    assert fault_of(Reply({}, 1, {"gflop": 12.5}), {}, 1.0, 1) is None
