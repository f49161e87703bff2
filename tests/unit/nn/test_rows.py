"""Gates by row: every token of a row weighs alike, by the row's own tokens, whatever shares the batch or follows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import workplaces
from coterie.compute.batched import answer_all
from coterie.compute.client import LocalCompute
from coterie.data.rows import ClientData, PromptRow
from coterie.nn.attach import attached
from coterie.nn.gates import similarity
from coterie.nn.rows import RowMask, RowScores, row_directions
from coterie.ops.streams import stream
from coterie.requests import Observe, Optim, Score, Train
from coterie.types import NO_EXPERT, Bank, ClientInfo, GateSpec, Key, Part, Target

torch.set_num_threads(1)
D_IN, D_OUT, SCALE = 12, 10, 0.5
TARGET = Target("0", D_IN, D_OUT)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "rows"), dtype=torch.float64)


def bank_over(targets: Any, seed: int = 0, gate: str = "similarity") -> Bank:
    """Two experts and one reference, of length below 1, on every target."""
    made = tiny.bank(targets, 2, 3, slots=1 if gate == "similarity" else 0, seed=seed, dtype=torch.float64)
    tensors = {
        key: 0.9 * value / value.norm() if key.part is Part.ROUTER else value for key, value in made.tensors.items()
    }
    return replace(made, tensors=tensors, gate=GateSpec(gate, {"scale": SCALE} if gate == "similarity" else {}))


class Taking(nn.Module):
    """A model of one Linear that is called as models are."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(D_IN, D_OUT).double().requires_grad_(False))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.get_submodule("0")(x)
        return result


def test_weights_are_feddpas_and_never_negative() -> None:
    p = torch.tensor([[0.8], [0.0], [-0.5]])
    torch.testing.assert_close(similarity(p, None, scale=0.5), torch.tensor([[0.6, 0.4], [1.0, 0.0], [1.0, 0.0]]))
    for router, scale in ((torch.zeros(1, 2), 0.5), (torch.zeros(1, 1), 0.0), (torch.zeros(1, 1), 1.5)):
        with pytest.raises(ValueError, match=r"one output, and 0 < scale <= 1"):
            similarity(router, None, scale=scale)


def test_the_layer_weighs_each_row_by_the_cosine_of_its_own_tokens() -> None:
    model, x, mask = Taking(), draw(3, 5, D_IN), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:], mask[2, :2] = 0, 0
    bank = bank_over([TARGET])
    with attached(model, bank):
        found = model(x, attention_mask=mask)
    reference = bank.tensors[Key("0", NO_EXPERT, Part.ROUTER)][0]
    for row, tokens in enumerate((slice(0, 5), slice(0, 3), slice(2, 5))):
        mean = x[row, tokens].mean(0)
        a = SCALE * max(float(mean @ reference / mean.norm()), 0.0)
        expected = model(x[row])
        for expert, weight in ((0, 1 - a), (1, a)):
            down, up = (bank.tensors[Key("0", expert, part)] for part in (Part.A, Part.B))
            expected = expected + bank.scaling * weight * x[row] @ down.T @ up.T
        torch.testing.assert_close(found[row], expected, atol=1e-12, rtol=1e-12)


def test_without_a_mask_all_tokens_count_and_after_detaching_nothing_is_left() -> None:
    model, x = Taking(), draw(2, 4, D_IN)
    with attached(model, bank_over([TARGET])):
        whole = model(x)
        torch.testing.assert_close(model(x, attention_mask=torch.ones(2, 4)), whole)
    assert not model._forward_pre_hooks
    with attached(model, bank_over([TARGET], gate="constant")):
        assert not model._forward_pre_hooks, "only a gate by row needs to see the mask"


@pytest.mark.parametrize("flat", [False, True])
def test_tokens_that_are_added_to_rows_weigh_as_their_rows_did(flat: bool) -> None:
    scores, x, router = RowScores(), draw(2, 4, D_IN), draw(1, D_IN, seed=1)
    mask = RowMask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    given = x.flatten(0, 1) if flat else x
    first = scores.spread(given, x.flatten(0, 1) @ router.T, mask).view(2, 4)
    assert torch.equal(first[:, :1].expand(2, 4), first)
    assert float((first[0, 0] - first[1, 0]).abs()) > 1e-3
    mask.attention = torch.ones(2, 5)
    new = draw(2, 1, D_IN, seed=2)
    assert torch.equal(scores.spread(new, new.flatten(0, 1) @ router.T, mask), first[:, :1])
    mask.attention = torch.ones(2, 1)  # another batch, of rows of one token
    assert not torch.allclose(scores.spread(new, new.flatten(0, 1) @ router.T, mask), first[:, :1])


def test_gradients_reach_the_router_and_the_input() -> None:
    scores, mask = RowScores(), RowMask(torch.tensor([[1, 1, 0], [1, 1, 1]]))

    def spread(x: Tensor, router: Tensor) -> Tensor:
        return scores.spread(x, x.flatten(0, 1) @ router.T, mask)

    inputs = (draw(2, 3, 4).requires_grad_(), draw(2, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(spread, inputs)


def test_directions_have_length_1_and_a_row_of_nothing_has_none() -> None:
    found = row_directions(draw(2, 3, 4), RowMask(torch.tensor([[1, 1, 0], [0, 0, 0]])))
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 0.0], dtype=torch.float64))


# with a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_what_shares_the_batch_does_not_matter(arch: str) -> None:
    model = tiny.model(arch, "classification" if arch == "bert" else "generation").double()
    batch = tiny.batch(3, 7)
    with attached(model, bank_over(tiny.targets(model))), torch.no_grad():
        together = model(**batch).logits
        for row in range(3):
            real = int(batch["attention_mask"][row].sum())
            alone = model(**{name: value[row : row + 1, :real] for name, value in batch.items()}).logits[0]
            of_batch = together[row] if arch == "bert" else together[row, :real]
            torch.testing.assert_close(of_batch, alone, atol=1e-9, rtol=1e-9)


def test_generation_weighs_by_the_prompt_where_no_row_is_padded_too() -> None:
    model = tiny.model("llama", "generation").double()
    batch = tiny.batch(2, 6, left=True)
    with attached(model, bank_over(tiny.targets(model))):
        together, alone = (
            model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
            for inputs in (batch, {name: value[:1] for name, value in batch.items()})
        )
    assert batch["attention_mask"][0].all()  # transformers passes no mask of ones
    assert together[0].tolist() == alone[0].tolist()


def test_a_completion_does_not_weigh_itself() -> None:
    """The loss of a completion is that of the weights which its prompt alone gives."""
    workplace = workplaces.make_workplace("llama")
    bank = bank_over(workplace.base.spec.targets)
    data = ClientData(ClientInfo("north", 1), {"train": (PromptRow("two words", " and a long completion"),)})
    (scored,) = LocalCompute(workplace, data, 1).score(Score([bank]))
    batch = workplace.task.collate(workplace.examples(data, "train"))
    prompt = int(batch.prompt.sum())
    assert 0 < prompt < batch.mask.sum()

    def loss(of: Any) -> float:
        with attached(workplace.base.model, bank) as handle, torch.no_grad():
            handle.now.rows.prompt = of
            return float(workplace.task.loss(workplace.base.model(**batch.inputs).logits, batch)) / batch.count

    with (
        torch.no_grad(),
        attached(workplace.base.model, bank),
    ):  # generation as it goes: the prompt, then token by token
        ids, logits = batch.inputs["input_ids"], []
        out = workplace.base.model(ids[:, :prompt], attention_mask=torch.ones(1, prompt), use_cache=True)
        logits.append(out.logits)
        for t in range(prompt, ids.shape[1]):
            mask = torch.ones(1, t + 1)
            cache = out.past_key_values
            out = workplace.base.model(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    by_steps = float(workplace.task.loss(torch.cat(logits, dim=1), batch)) / batch.count
    assert scored.loss == pytest.approx(loss(batch.prompt), abs=1e-12) == pytest.approx(by_steps, abs=1e-9)
    assert abs(scored.loss - loss(None)) > 1e-6


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_many_clients_in_one_pass_get_what_each_gets_alone(arch: str) -> None:
    workplace = workplaces.make_workplace(arch, eval_batch_size=4)
    names = ("north", "south", "west")
    clients = {n: workplaces.client_of(workplace, n, 8 - 2 * i) for i, n in enumerate(names)}
    banks = {}
    for i, name in enumerate(names):
        head = (
            {k: v.double() for k, v in tiny.head(workplace.base.model, workplaces.LABELS).items()}
            if arch == "bert"
            else {}
        )
        made = bank_over(workplace.base.spec.targets, seed=i)
        banks[name] = replace(made, tensors={**made.tensors, **{k: v.double() for k, v in head.items()}}, dropout=0.1)
    ways: list[Any] = [
        lambda bank: Score([bank], "test"),
        lambda bank: Observe(bank, "test", ("usage", "directions")),
        lambda bank: Observe(replace(bank, gate=GateSpec(), tensors=without_router(bank)), "train", ("directions",)),
        lambda bank: Train(bank, frozenset(bank.tensors), Optim(batch_size=3, epochs=1)),
    ]
    for way in ways:
        computes = [LocalCompute(workplace, clients[n], 1) for n in names]
        together = answer_all(list(zip(computes, map(way, banks.values()), strict=True)), print)
        for name, found in zip(names, together, strict=True):
            assert not isinstance(found, Exception), found
            ((alone,),) = [answer_all([(LocalCompute(workplace, clients[name], 1), way(banks[name]))], print)]
            assert furthest(found, alone) < 1e-6  # directions are kept in float32


def without_router(bank: Bank) -> dict[Key, Tensor]:
    return {key: value for key, value in bank.tensors.items() if key.part is not Part.ROUTER}


def furthest(one: Any, other: Any) -> float:
    if isinstance(one, Tensor):
        return float((one - other).abs().max())
    if isinstance(one, float):
        return abs(one - other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((furthest(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple):
        return max((furthest(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if hasattr(one, "__dataclass_fields__"):
        return furthest(vars(one), vars(other))
    assert one == other
    return 0.0


def test_directions_are_the_mean_over_rows_of_what_a_module_takes() -> None:
    workplace = workplaces.make_workplace("bert", eval_batch_size=3)
    client, bank = workplaces.client_of(workplace), workplaces.plain_bank(workplace)
    observed = LocalCompute(workplace, client, 1).observe(Observe(bank, "train", ("directions",)))
    assert {key.part for key in observed.directions} == {Part.EMBEDDING}
    module = sorted(key.module for key in observed.directions)[0]
    taken: list[Tensor] = []
    hook = workplace.base.model.get_submodule(module).register_forward_hook(
        lambda _, args, __: taken.append(args[0][0])
    )
    with attached(workplace.base.model, bank), torch.no_grad():
        for example in workplace.examples(client, "train"):
            workplace.base.model(**workplace.task.collate([example]).inputs)
    hook.remove()
    means = torch.stack([tokens.mean(0) for tokens in taken])
    expected = (means / means.norm(dim=1, keepdim=True)).mean(0).float()
    torch.testing.assert_close(observed.directions[Key(module, NO_EXPERT, Part.EMBEDDING)], expected)
    some = LocalCompute(workplace, client, 1).observe(Observe(bank, "train", ("directions",), examples=2))
    assert not torch.allclose(some.directions[Key(module, NO_EXPERT, Part.EMBEDDING)], expected)
