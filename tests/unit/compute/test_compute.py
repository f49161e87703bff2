"""The training loop against a plain loop with an explicit LoRA; scores and observations against direct computation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.compute import loading, score
from coterie.compute import micro_batches as drawing
from coterie.compute import train as training
from coterie.compute.client import LocalCompute
from coterie.compute.generate import completions
from coterie.compute.loading import resolve_precision
from coterie.compute.passes import Passes
from coterie.compute.workplace import Workplace
from coterie.data.examples import Batch, Example, batches
from coterie.data.rows import ClientData, PromptRow, TextRow
from coterie.data.tasks import Classification, Generation
from coterie.nn.attach import attached
from coterie.nn.base import load_base
from coterie.nn.rows import RowMask
from coterie.ops.streams import stream
from coterie.requests import Observe, Optim, Sample, Score, Train, Trained
from coterie.types import Bank, ClientInfo, CoterieError, Key, Part
from workplaces import TEXTS, TOKENIZER, client_of, equal_bits, largest_difference, make_workplace, plain_bank, train

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# a plain loop --------------------------------------------------------------------------------------------------------


class ExplicitLora(nn.Module):
    """y = W0 x + s B A x, written out."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = base, nn.Parameter(a.clone()), nn.Parameter(b.clone()), scaling

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scaling * ((x @ self.a.T) @ self.b.T)


def explicit(workplace: Workplace, bank: Bank) -> tuple[nn.Module, dict[Key, nn.Parameter]]:
    """A copy of the model with the bank built in, and its parameters by key."""
    model, parameters = copy.deepcopy(workplace.base.model), {}
    for key, value in bank.tensors.items():
        if key.part is Part.A:
            b = key._replace(part=Part.B)
            layer = ExplicitLora(model.get_submodule(key.module), value, bank.tensors[b], bank.scaling)
            model.set_submodule(key.module, layer)
            parameters |= {key: layer.a, b: layer.b}
        if key.part is Part.HEAD:
            parameters[key] = model.get_parameter(key.module)
            parameters[key].data = value.clone()
    return model, {key: parameter.requires_grad_() for key, parameter in parameters.items()}


def loss_of(model: nn.Module, task: Any, example: Example) -> tuple[Tensor, int]:
    """The sum of the losses of one row without padding, and over how many labels."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    if isinstance(task, Classification):
        return -logits.log_softmax(-1)[example.label], 1
    ends = range(example.prompt, len(example.ids))
    return -sum(logits[end - 1].log_softmax(-1)[example.ids[end]] for end in ends), len(ends)  # type: ignore[return-value]


def plain_training(
    workplace: Workplace, bank: Bank, optim: Optim, rnd: int, steps: list[list[Example]]
) -> dict[Key, Tensor]:
    """What training should give: the optimisers, schedules and clipping by their formulas, one row at a time."""
    model, parameters = explicit(workplace, bank)
    moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in parameters.items()}
    for step, examples in enumerate(steps):
        terms = [loss_of(model, workplace.task, example) for example in examples]
        loss = sum(term for term, _ in terms) / sum(count for _, count in terms)
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        shrink = min(1.0, optim.clip / (norm + 1e-6)) if optim.clip else 1.0
        progress = step / len(steps)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        rate = optim.learning_rate * optim.round_decay ** (rnd - 1) * factor[optim.schedule]
        for key, p in parameters.items():
            grad, (first, second) = grads[key] * shrink, moments[key]
            if optim.optimizer == "sgd":
                grad = grad + optim.weight_decay * p.data
                first = grad if step == 0 else optim.momentum * first + grad
                p.data = p.data - rate * first
            else:
                first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
                unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                p.data = p.data * (1 - rate * optim.weight_decay) - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            moments[key] = first, second
    return {key: p.detach() for key, p in parameters.items()}


WAYS = {
    "adamw, linear, clipped": (1, {"schedule": "linear", "clip": 0.05}),
    "adamw, cosine, round 4": (4, {"schedule": "cosine", "clip": 0, "round_decay": 0.7, "weight_decay": 0.0}),
    "adamw, constant, decay": (2, {"schedule": "constant", "clip": 1e9, "weight_decay": 0.5}),
    "sgd, linear, clipped": (1, {"optimizer": "sgd", "schedule": "linear", "clip": 0.05}),
    "sgd, momentum, decay": (
        3,
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.3, "round_decay": 0.5, "clip": 0},
    ),
}


@pytest.mark.parametrize("arch", ["bert", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_training_is_a_plain_loop_with_an_explicit_lora(way: str, arch: str) -> None:
    rnd, settings = WAYS[way]
    optim = Optim(**{"learning_rate": 0.02, "epochs": 3, "batch_size": 50, **settings})
    workplace = make_workplace(arch)
    client, bank = client_of(workplace), plain_bank(workplace)
    everything = workplace.examples(client, "train")
    trained = train(workplace, bank, optim, rnd, client=client)
    expected = plain_training(workplace, bank, optim, rnd, [everything] * 3)
    assert trained.steps == 3
    assert largest_difference(trained.tensors, bank.tensors) > 1e-3
    assert largest_difference(trained.tensors, expected) < 1e-10


def test_batches_come_from_the_stream_of_the_epoch() -> None:
    workplace = make_workplace(seed=5)
    client, bank = client_of(workplace), plain_bank(workplace)
    optim = Optim(learning_rate=0.02, epochs=2, batch_size=3)
    steps = [
        part
        for epoch in range(2)
        for part in batches(workplace.examples(client, "train"), 3, stream(5, 2, "north", "train", "batches", epoch))
    ]
    trained = train(workplace, bank, optim, 2, client=client)
    assert (trained.steps, trained.examples) == (6, 16)
    assert largest_difference(trained.tensors, plain_training(workplace, bank, optim, 2, steps)) < 1e-10


# counts, sums, steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_accumulated_gradients_are_those_of_one_large_batch(arch: str) -> None:
    """Rows have unequal numbers of tokens, so a mean of two means would be something else."""
    workplace = make_workplace(arch)
    bank, step = (
        plain_bank(workplace),
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0, "clip": 0, "epochs": 1},
    )
    whole = train(workplace, bank, Optim(batch_size=8, **step))
    parts = train(workplace, bank, Optim(batch_size=4, accumulate=2, **step))
    assert whole.steps == parts.steps == 1
    assert largest_difference(whole.tensors, parts.tensors) < 1e-12
    assert largest_difference(whole.tensors, bank.tensors) > 1e-3
    assert parts.loss == pytest.approx(whole.loss, abs=1e-12)
    if arch == "gpt2":
        counts = [
            workplace.task.collate([example]).count for example in workplace.examples(client_of(workplace), "train")
        ]
        assert len(set(counts)) > 2


def test_a_last_step_takes_the_batches_that_are_left() -> None:
    workplace = make_workplace()
    client = client_of(workplace, number=10)
    trained = train(workplace, plain_bank(workplace), Optim(batch_size=2, accumulate=2, epochs=2), client=client)
    assert (trained.steps, trained.examples) == (6, 20)


def test_steps_take_the_place_of_epochs() -> None:
    workplace = make_workplace()
    client = client_of(workplace)
    trained = train(workplace, plain_bank(workplace), Optim(batch_size=4, steps=5, epochs=1), client=client)
    assert (trained.steps, trained.examples) == (5, 20)
    trained = train(
        workplace, plain_bank(workplace), Optim(batch_size=4, steps=3, accumulate=2, epochs=1), client=client
    )
    assert (trained.steps, trained.examples) == (3, 24)
    tokens = sum(len(example.ids) for example in workplace.examples(client, "train"))
    assert trained.tokens == 3 * tokens
    trained = train(workplace, plain_bank(workplace), Optim(batch_size=4, steps=1, epochs=9), client=client)
    assert (trained.steps, trained.examples) == (1, 4)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_the_loss_is_a_mean_over_what_counts_not_over_steps(arch: str) -> None:
    workplace = make_workplace(arch)
    client, bank = client_of(workplace, number=10), plain_bank(workplace)
    (before,) = LocalCompute(workplace, client, 1).score(Score([bank], "train"))
    trained = train(workplace, bank, Optim(learning_rate=1e-15, batch_size=4, epochs=1), client=client)
    assert trained.loss == pytest.approx(before.loss, abs=1e-9)


# random streams ------------------------------------------------------------------------------------------------------


def orders(monkeypatch: pytest.MonkeyPatch, seed: int, rnd: int, client: str, purpose: str) -> list[list[str]]:
    """The batches, as texts, in which a client's rows came."""
    seen: list[list[str]] = []

    def spy(examples: list[Example], size: int, generator: torch.Generator) -> list[list[Example]]:
        made = batches(examples, size, generator)
        seen.extend([TOKENIZER.decode(e.ids, skip_special_tokens=True) for e in part] for part in made)
        return made

    monkeypatch.setattr(drawing, "batches", spy)
    workplace = make_workplace(seed=seed)
    train(
        workplace,
        plain_bank(workplace),
        Optim(batch_size=2, epochs=2),
        rnd,
        client=client_of(workplace, client),
        purpose=purpose,
    )
    return seen


def test_another_seed_round_client_or_purpose_draws_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [(0, 1, "north", "train"), (1, 1, "north", "train"), (0, 2, "north", "train"), (0, 1, "south", "train")]
    found = [orders(monkeypatch, *of) for of in [*streams, (0, 1, "north", "again")]]
    assert orders(monkeypatch, *streams[0]) == found[0]
    assert len({str(order) for order in found}) == 5
    assert found[0][:4] != found[0][4:], "epochs differ"
    assert all(sorted(text for part in order for text in part) == sorted(TEXTS[:8] * 2) for order in found)


def test_another_seed_round_client_or_purpose_draws_other_dropout() -> None:
    def once(seed: int = 0, rnd: int = 1, client: str = "north", purpose: str = "train") -> Trained:
        workplace = make_workplace(seed=seed)
        bank = plain_bank(workplace, dropout=0.4)
        optim = Optim(optimizer="sgd", learning_rate=0.1, batch_size=50, epochs=1)  # one batch: its order is no matter
        return train(workplace, bank, optim, rnd, client=client_of(workplace, client), purpose=purpose)

    first = once()
    assert equal_bits(once().tensors, first.tensors)
    for other in (once(seed=1), once(rnd=2), once(client="south"), once(purpose="again")):
        assert largest_difference(other.tensors, first.tensors) > 1e-4


def test_every_step_draws_its_own_dropout() -> None:
    workplace = make_workplace()
    bank = plain_bank(workplace, dropout=0.4)
    still = {"optimizer": "sgd", "learning_rate": 1e-9, "batch_size": 50, "schedule": "constant"}
    losses = [train(workplace, bank, Optim(steps=steps, **still)).loss * steps for steps in (1, 2, 3)]
    assert len({round(loss, 6) for loss in (losses[0], losses[1] - losses[0], losses[2] - losses[1])}) == 3


def test_a_client_does_not_feel_who_came_before_it() -> None:
    optim = Optim(learning_rate=0.02, batch_size=3, epochs=1)
    alone = make_workplace()
    expected = train(alone, plain_bank(alone, dropout=0.3), optim, client=client_of(alone, "b"))
    workplace = make_workplace()
    bank, first = plain_bank(workplace, dropout=0.3), client_of(workplace, "a", number=5)
    train(workplace, plain_bank(workplace, dropout=0.2, seed=7), optim, client=first)
    LocalCompute(workplace, first, 1).score(Score([bank], "test"))
    LocalCompute(workplace, first, 1).observe(Observe(bank, "train"))
    again = train(workplace, bank, optim, client=client_of(workplace, "b"))
    assert equal_bits(again.tensors, expected.tensors)
    assert again == replace(expected, tensors=again.tensors)


# what is left behind -------------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[str]:
    """Hooks, gradients and trainable parameters of a model that should have none."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [f"{name} {kind}" for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]
    return hooks + [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None]


def test_only_what_was_asked_for_is_trained_and_the_base_stays_as_it_was() -> None:
    workplace = make_workplace()
    model, bank = workplace.base.model, plain_bank(workplace, dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {key: value.clone() for key, value in bank.tensors.items()}
    modules = dict(model.named_modules())
    wanted = frozenset(key for key in bank.tensors if key.part is Part.B and "query" in key.module)
    assert len(wanted) == 2
    trained = LocalCompute(workplace, client_of(workplace), 1).train(Train(bank, wanted, Optim(epochs=1)))
    assert trained.tensors.keys() == wanted
    assert all(not torch.equal(trained.tensors[key], given[key]) for key in wanted)
    assert equal_bits(bank.tensors, given)
    LocalCompute(workplace, client_of(workplace), 1).score(Score([bank], "test"))
    LocalCompute(workplace, client_of(workplace), 1).observe(Observe(bank, "test"))
    assert equal_bits(model.state_dict(), before)
    assert dict(model.named_modules()) == modules
    assert traces(model) == []
    assert not model.training


@dataclass(frozen=True)
class Poisoned(Classification):
    """A task whose loss is not finite in one forward pass."""

    at: int = 1
    value: float = math.nan
    calls: list[int] = field(default_factory=list)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        self.calls.append(1)
        return super().loss(logits, batch) * (self.value if len(self.calls) == self.at else 1.0)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 7])
def test_a_loss_that_is_not_finite_names_client_round_and_step(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_CHECK_EVERY", 3)
    workplace = make_workplace()
    workplace.task = Poisoned(TOKENIZER, 32, at=at, value=math.nan if at % 2 else math.inf)
    with pytest.raises(CoterieError, match=rf"client north: the loss is not finite at step {at} of round 4;.*learning"):
        train(workplace, plain_bank(workplace), Optim(batch_size=4, steps=7), 4)
    assert traces(workplace.base.model) == []


def test_tensors_that_are_not_finite_are_not_handed_out() -> None:
    """A last step that overflows, after a loss that did not."""
    workplace = make_workplace(dtype=torch.float32)
    client, bank = client_of(workplace), plain_bank(workplace)
    optim = Optim(optimizer="sgd", learning_rate=1e30, weight_decay=1e30, steps=1)
    with pytest.raises(CoterieError, match=r"client north: round 3 left values in .* that are not finite; lower"):
        train(workplace, bank, optim, 3, client=client)
    assert traces(workplace.base.model) == []


def test_the_loss_is_looked_at_before_all_steps_are_done() -> None:
    workplace = make_workplace()
    workplace.task = Poisoned(TOKENIZER, 32, at=2)
    with pytest.raises(CoterieError, match="step 2 "):
        train(workplace, plain_bank(workplace), Optim(batch_size=4, steps=100))
    assert len(workplace.task.calls) == training._CHECK_EVERY


def test_a_split_without_rows_names_the_client_and_what_it_has() -> None:
    workplace = make_workplace()
    client = ClientData(ClientInfo("north", 1), {"train": (TextRow("a", 0),), "validation": (), "test": ()})
    with pytest.raises(CoterieError, match="client north has no validation rows; it has train"):
        LocalCompute(workplace, client, 1).score(Score([plain_bank(workplace)], "validation"))
    empty = ClientData(ClientInfo("north", 0), {"train": ()})
    with pytest.raises(CoterieError, match="client north has no train rows; it has none"):
        train(workplace, plain_bank(workplace), Optim(steps=3), client=empty)


# scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_scores_are_those_of_each_bank_alone_and_of_direct_computation(arch: str) -> None:
    workplace = make_workplace(arch)
    client = client_of(workplace)
    banks = [plain_bank(workplace, dropout=0.5, seed=seed) for seed in range(3)]
    worker = LocalCompute(workplace, client, 1)
    together = worker.score(Score(banks, "test"))
    assert together == [worker.score(Score([bank], "test"))[0] for bank in banks]
    assert len({scored.loss for scored in together}) == 3
    for bank, scored in zip(banks, together, strict=True):
        model, _ = explicit(workplace, bank)
        terms = [loss_of(model, workplace.task, example) for example in workplace.examples(client, "test")]
        loss = sum(float(term.detach()) for term, _ in terms) / sum(count for _, count in terms)
        assert scored.loss == pytest.approx(loss, abs=1e-9)
        assert scored.examples == len(client.splits["test"]) == 5
        if arch == "llama":
            assert scored.metrics == {"perplexity": pytest.approx(math.exp(loss))}
        else:
            right = [
                int(model(input_ids=torch.tensor([e.ids])).logits.argmax()) == e.label
                for e in workplace.examples(client, "test")
            ]
            assert scored.metrics["accuracy"] == sum(right) / 5
            assert scored.metrics.keys() == {"accuracy", "macro_f1", "matthews"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("arch", ["bert", "roberta", "llama", "gpt2"])
def test_scores_do_not_depend_on_batches_and_padding(arch: str, dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for size in (1, 3, 64):
        workplace = make_workplace(arch, dtype, eval_batch_size=size)
        bank = plain_bank(workplace, experts=2, gate="slot_top_k", options={"own": 1})
        found += LocalCompute(workplace, client_of(workplace), 1).score(Score([bank], "train"))
    assert [scored.loss for scored in found] == pytest.approx([found[0].loss] * 3, abs=tolerance, rel=tolerance)
    if arch in tiny.ENCODERS:
        assert [scored.metrics for scored in found] == [found[0].metrics] * 3


# generated text ------------------------------------------------------------------------------------------------------


def greedy(workplace: Workplace, bank: Bank, row: PromptRow, steps: int) -> list[int]:
    """The most likely tokens one after the other, the whole text anew each time."""
    model, _ = explicit(workplace, bank)
    ids = list(workplace.task.prompt_ids(row))  # type: ignore[union-attr]
    start = len(ids)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_generated_text_is_greedy_whatever_the_batch(arch: str, checkpointing: bool) -> None:
    workplace = make_workplace(arch)
    client, bank = (
        client_of(workplace),
        Bank(tiny.bank(workplace.base.spec.targets, dtype=torch.float64).tensors, scaling=2.0),
    )
    rows = [row for row in client.splits["test"] if isinstance(row, PromptRow)]
    assert len({len(row.prompt) for row in rows}) > 2
    expected = [greedy(workplace, bank, row, 6) for row in rows]
    assert all(2 not in ids for ids in expected), "no end of text among them, so that all six count"
    if checkpointing:
        workplace.base.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        workplace.base.model.train()
    for size in (1, 2, 64):
        workplace.eval_batch_size = size
        texts: list[str] = []

        def keep(references: list[str], made: list[str], scores: object) -> dict[str, float]:
            texts.extend(made)  # noqa: B023
            return {"exact_match": 0.25}

        workplace.task = Generation(TOKENIZER, 32, 6, generates=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score, "text_metrics", keep)
            (scored,) = LocalCompute(workplace, client, 1).score(Score([bank], "test"))
            LocalCompute(workplace, client, 1).score(Score([bank], "validation"))
            (shown,) = LocalCompute(workplace, client, 1).score(Score([bank], "test", samples=1))
        assert scored.samples == []
        row = client.splits["test"][0]
        assert isinstance(row, PromptRow)
        assert shown.samples == [Sample(row.prompt, row.completion, TOKENIZER.decode(expected[0]))]
        del texts[len(expected) :]
        assert texts == [TOKENIZER.decode(ids) for ids in expected], "and only the test split is generated"
        assert scored.metrics["exact_match"] == 0.25
    assert workplace.base.model.training == checkpointing


def test_text_ends_where_the_tokenizer_says_even_if_the_model_does_not_know() -> None:
    workplace = make_workplace("llama")
    workplace.base.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    row, tokenizer = PromptRow("abc", ""), tiny.tokenizer(chat=True)
    workplace.task = Generation(tokenizer, 32, 6)
    assert isinstance(workplace.task, Generation)
    ids = greedy(workplace, Bank({}), row, 6)
    assert completions(Passes(workplace, RowMask()), [[row]], ["a"])[0] == [tokenizer.decode(ids)]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    end = next(i for i in range(1, 6) if tokens[i] is not None and ids[i] not in ids[:i])
    tokenizer.add_special_tokens({"eos_token": tokens[end]})
    assert completions(Passes(workplace, RowMask()), [[row]], ["a"])[0] == [tokenizer.decode(ids[:end])]


# usage ---------------------------------------------------------------------------------------------------------------


def inputs_of(workplace: Workplace, bank: Bank, examples: Iterable[Example], module: str) -> Tensor:
    """What reaches ``module`` [tokens, d_in], one row at a time without padding."""
    seen: list[Tensor] = []
    with attached(workplace.base.model, bank), torch.no_grad():
        hook = workplace.base.model.get_submodule(module).register_forward_pre_hook(
            lambda m, args: seen.append(args[0][0])
        )
        for example in examples:
            workplace.base.model(input_ids=torch.tensor([example.ids]))
        hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_usage_counts_every_token_and_no_padding(size: int) -> None:
    workplace = make_workplace(eval_batch_size=size)
    client, own = client_of(workplace), 1
    bank = plain_bank(workplace, experts=3, gate="slot_top_k", options={"own": own})
    observed = LocalCompute(workplace, client, 1).observe(Observe(bank, "test"))
    examples = workplace.examples(client, "test")
    assert observed.tokens == sum(len(example.ids) for example in examples)
    assert observed.usage.keys() == {target.name for target in workplace.base.spec.targets}
    for module, usage in observed.usage.items():
        x = inputs_of(workplace, bank, examples, module)
        weight, used = torch.zeros(2, 3, dtype=torch.float64)
        for scores in x @ bank.tensors[Key(module, -1, Part.ROUTER)].T:
            chosen = sorted(range(5), key=lambda slot: -float(scores[slot]))[:3]
            mass = scores[chosen].softmax(0)
            gate = torch.zeros(3, dtype=torch.float64)
            for slot, w in zip(chosen, mass, strict=True):
                gate[slot if slot < 3 else own] += w
            weight, used = weight + gate, used + (gate > 0)
        assert usage.weight == pytest.approx((weight / len(x)).tolist(), abs=1e-9)
        assert usage.share == pytest.approx((used / len(x)).tolist(), abs=1e-9)
        assert sum(usage.weight) == pytest.approx(1)
        assert usage.share[own] == 1
        assert all(0 <= share <= 1 for share in usage.share)


def test_a_bank_without_a_gate_has_no_usage_and_unknown_statistics_are_refused() -> None:
    workplace = make_workplace()
    worker = LocalCompute(workplace, client_of(workplace), 1)
    observed = worker.observe(Observe(plain_bank(workplace), "validation"))
    assert observed.usage == {}
    assert observed.tokens > 0
    with pytest.raises(ValueError, match=r"cannot observe \['moods'\]; known: .*embeddings.*usage"):
        worker.observe(Observe(plain_bank(workplace), "train", ("usage", "moods")))


# precision and checkpointing -----------------------------------------------------------------------------------------


def test_bfloat16_autocast_trains_close_to_float32() -> None:
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        workplace = make_workplace(dtype=torch.float32, precision=precision)
        bank = plain_bank(workplace, dropout=0.1)
        trained = train(workplace, bank, Optim(learning_rate=1e-3, batch_size=4, epochs=2))
        assert all(value.dtype == torch.float32 for value in trained.tensors.values())
        (scored,) = LocalCompute(workplace, client_of(workplace), 1).score(Score([bank], "train"))
        found[precision] = trained.loss, scored.loss, trained.tensors
    full, half = found["float32"], found["bfloat16"]
    assert half[:2] == pytest.approx(full[:2], rel=0.03)
    assert half[:2] != full[:2]
    assert 0 < largest_difference(full[2], half[2]) < 0.02


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32"), (None, "float32")])
def test_auto_precision_is_what_the_device_computes_in(
    native: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "native_bfloat16", lambda: native)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert [resolve_precision(setting, cpu) for setting in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_gradient_checkpointing_trains_the_same_tensors(arch: str, tmp_path: Path) -> None:
    """With dropout, whose mask must be the same when a layer is computed again."""
    folder = tiny.folder(tmp_path / "model", arch)
    kind: Any = "classification" if arch in tiny.ENCODERS else "generation"
    found, passes = [], []
    for checkpointing in (False, True):
        base = load_base(str(folder), kind, dtype=torch.float64, gradient_checkpointing=checkpointing)
        task = Classification(base.tokenizer, 32) if kind == "classification" else Generation(base.tokenizer, 32)
        workplace = Workplace(base, task, 0)
        counted: list[int] = []
        base.model.get_submodule(base.spec.targets[0].name).register_forward_hook(count_into(counted))
        found.append(
            train(workplace, plain_bank(workplace, dropout=0.3), Optim(learning_rate=0.02, batch_size=4, epochs=2))
        )
        passes.append(len(counted))
    assert passes == [4, 8], "every layer is computed again in the backward pass"
    assert largest_difference(found[0].tensors, found[1].tensors) < 1e-9
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-12)


def count_into(counted: list[int]) -> Callable[..., None]:
    return lambda *_: counted.append(1)
