"""Every method with packed rows against padded ones: the same answers, round by round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_batched import double, floats, furthest, in_double, loaded, make_workplace, method_of, with_training

from coterie.compute.client import LocalCompute
from coterie.methods.base import drive
from coterie.methods.registry import methods
from coterie.requests import ClientProgram, Train
from few_rounds import OPTIM, ROUNDS

NAMES = sorted(methods())


def prepared(program: ClientProgram, packing: bool) -> ClientProgram:
    """The program with or without packing, and without what depends on the rows of a batch: dropout's masks, and
    padding in statistics."""

    def change(train: Train) -> Train:
        optim = train.optim.model_copy(update={"packing": packing, "steps": 2})
        balance = train.balance and replace(train.balance, padding=False)
        return replace(train, optim=optim, balance=balance, bank=replace(train.bank, dropout=0.0))

    return with_training(program, change)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_give_the_answers_of_padded_ones(name: str) -> None:
    torch.set_num_threads(1)
    kind = "generation"
    method, workplace = method_of(name, kind, optim=OPTIM), make_workplace(kind)
    clients = loaded(kind, torch.float64)[1][:3]
    infos = [c.info for c in clients]
    state = method.init(workplace.base.spec, infos)
    personal = {c.id: method.begin(workplace.base.spec, c) for c in infos}
    for rnd in range(1, ROUNDS + 1):
        instructions = method.configure(state, infos, rnd)
        results = {}
        for client in clients:
            ins, mine = instructions[client.info.id], personal[client.info.id]
            ins, mine = (replace(each, tensors=double(each.tensors)) for each in (ins, mine))
            one, other = (
                drive(
                    prepared(in_double(method.client(ins, client.info, mine)), packing),
                    LocalCompute(workplace, client, rnd),
                )
                for packing in (False, True)
            )
            assert furthest(one, other) < 1e-8
            results[client.info.id] = one
        single = {c: replace(r.reply, tensors=floats(r.reply.tensors)) for c, r in results.items()}
        personal = {c: replace(r.personal, tensors=floats(r.personal.tensors)) for c, r in results.items()}
        state = method.aggregate(state, single, rnd)
