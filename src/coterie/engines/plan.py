"""What a run would take on this machine, before it loads its base: memory by parts, seconds a round, what to change.

One training step and one pass of evaluation are run on tensors without numbers (:mod:`coterie.compute.footprint`): the
method's first request, on the largest batch of any client. A base with a ``device_map`` is planned as a whole, against
the memory of its devices together. Seconds come from how fast this machine multiplies and moves numbers, measured for a
moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from coterie.compute.footprint import Footprint, evaluation_footprint, training_footprint
from coterie.compute.heap import gaps
from coterie.compute.loading import device_names, eval_rows, placement_of, prepare, resolve_precision, task_for
from coterie.compute.train import Training
from coterie.compute.workplace import Workplace
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.examples import Example, candidate
from coterie.data.rows import ClientData
from coterie.engines.batch_size import first_request
from coterie.nn.base import spec_at
from coterie.nn.gates import forget_slots
from coterie.nn.locate import resolve
from coterie.nn.quantised import check_parts, weight_bytes
from coterie.nn.unloaded import shapes_alone, unloaded_base
from coterie.requests import Train
from coterie.types import CoterieError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARE = 0.9  # of the free memory that a run may take before there is advice
_PARTS = 16  # chunks of the loss in a pass whose logits are too small to count
_MEASURED = 0.2  # seconds of each measurement of the machine's speed


@dataclass(frozen=True)
class Plan:
    """What a run would take. In bytes, at the peak of a pass: ``process`` is Python and its libraries, ``base`` the
    frozen weights, ``banks`` those of the clients in the pass, ``optimiser`` its state, ``activations`` and ``logits``
    what the pass holds beside them, ``batch`` its rows, ``gaps`` what the allocator keeps between all these,
    ``replies`` what all clients send in a round. ``free`` is what the device has for all of it. ``seconds``: a round of
    all clients, with their evaluation. ``rows`` and ``tokens`` are those of the largest batch.
    """

    device: str
    process: int
    base: int
    banks: int
    optimiser: int
    activations: int
    logits: int
    batch: int
    gaps: int
    replies: int
    free: int
    seconds: float
    rows: int
    tokens: int
    advice: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The bytes of a pass beside process, base and replies."""
        return self.banks + self.optimiser + self.activations + self.logits + self.batch + self.gaps

    @property
    def total(self) -> int:
        """All bytes at the peak; on a GPU without the process and the replies, which are in the machine's memory."""
        return self.base + self.step + (self.process + self.replies if self.device == "cpu" else 0)

    @property
    def fits(self) -> bool:
        return self.total <= _SHARE * self.free


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: ``flops`` of products, ``moved`` bytes; ``start``: seconds that an operation
    takes to start."""

    flops: float
    moved: float
    start: float

    def seconds(self, work: Footprint, share: float = 1.0) -> float:
        """The time of ``share`` of that work; every operation is started anyway."""
        return share * (work.flops / self.flops + work.made / self.moved) + work.operations * self.start


def plan(config: Config, root: Path, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """The plan of a run on this machine. Relative paths start at ``root``; ``clock`` measures the machine's speed.

    Reads the data, the tokenizer, and the weights for their digest alone. Raises :class:`CoterieError` as a run does,
    and for preferences and ``unit = "example"``, whose passes are not planned.
    """
    _check_planned(config)
    workplace, mode, clients = _workplace(config, root)
    request = largest_request(config, root, clients)
    client, examples = largest_batch(workplace, clients, request)
    together = 1 if config.engine.clients_per_batch == "auto" else min(config.engine.clients_per_batch, len(clients))

    def step(workplace: Workplace) -> Footprint:
        return training_footprint([training_on(workplace, client, request, examples) for _ in range(together)], mode)

    try:
        training = step(workplace)
        decodes = config.task.kind != "classification"
        rest = step(_with_few_logits(workplace, examples)) if decodes else training
        tested = evaluation_footprint(workplace, request.bank, _longest_tested(workplace, clients), mode)
    finally:
        forget_slots()
    held = max(training.total, tested.total)
    banks, activations = training.banks + _bytes(request), rest.passes
    return _advised(config, Plan(
        device=workplace.device.type,
        process=psutil.Process().memory_info().rss,
        base=weight_bytes(workplace.base.model, config.model.quantize),
        banks=banks,
        optimiser=training.optimiser,
        activations=activations,
        logits=max(0, held - training.banks - training.optimiser - training.batch - activations),
        batch=training.batch,
        gaps=gaps([training.trace, tested.trace]) if workplace.device.type == "cpu" else 0,
        replies=len(clients) * sum(request.bank.tensors[key].nbytes for key in request.trainable),
        free=sum(map(_memory, devices_of(config))),
        seconds=_seconds(workplace, clients, request, examples, training, tested, together, clock),
        rows=len(examples),
        tokens=max(len(example.ids) for example in examples),
    ))  # fmt: skip


def _with_few_logits(workplace: Workplace, examples: Sequence[Example]) -> Workplace:
    """The workplace with a loss in chunks, each of which holds the logits of a small part of the batch's tokens."""
    return replace(workplace, loss_chunk=max(1, sum(len(example.ids) for example in examples) // _PARTS))


def _check_planned(config: Config) -> None:
    """Raise :class:`CoterieError` for a run whose passes are not those of a plan."""
    if config.task.objective == "dpo":
        raise CoterieError(
            "a run with [task] objective = dpo cannot be planned yet; plan it on prompts and completions, with twice "
            "the [train] batch_size"
        )
    if config.privacy.by_row:
        raise CoterieError(
            'a run with [privacy] unit = "example" cannot be planned: its passes keep more; plan it without [privacy]'
        )


def _workplace(config: Config, root: Path) -> tuple[Workplace, torch._subclasses.FakeTensorMode, Sequence[ClientData]]:
    """A workplace whose base has no numbers, the mode that it was made in, and the clients."""
    clients = load_data(config.data, config.task.kind, config.run.seed, root).clients
    device = devices_of(config)[0]
    mode, precision = shapes_alone(), resolve_precision(config.engine.precision, device)
    path, kind, targets = resolve(config.model.path, root), config.task.kind, config.lora.targets
    base = unloaded_base(
        path, kind, mode, targets=targets, dtype=_DTYPES[config.model.dtype], device=str(device),
        gradient_checkpointing=config.model.gradient_checkpointing,
    )  # fmt: skip
    if placement := placement_of(config):
        placement.check(base.model)
        check_parts(placement, base.model, config.model.quantize)
    base = replace(base, spec=spec_at(path, kind, targets))
    with mode:
        prepare(base, config, precision)
    workplace = Workplace(
        base,
        task_for(config, base.tokenizer, root),
        config.run.seed,
        eval_batch_size=eval_rows(config.run.eval_batch_size, device),
        precision=precision,
        loss_chunk=config.engine.loss_chunk,
        all_clients={client.info.id: client for client in clients},
    )
    return workplace, mode, clients


def devices_of(config: Config) -> tuple[torch.device, ...]:
    """The devices that one copy of the base is on."""
    placement = placement_of(config)
    return placement.devices() if placement else (torch.device(device_names(config.engine.device)[0]),)


def largest_request(config: Config, root: Path, clients: Sequence[ClientData]) -> Train:
    """The largest of the clients' first requests to train."""
    method, infos = config.make_method(root), [client.info for client in clients]
    spec = spec_at(resolve(config.model.path, root), config.task.kind, config.lora.targets)
    instructions = method.configure(method.init(spec, infos), infos, 1)

    def of(client: ClientData) -> Train:
        ins, mine = instructions[client.info.id], method.begin(spec, client.info)
        return first_request(
            method.client(ins, client.info, mine), partial(method.bank, ins, client.info, mine), config.train
        )

    return max((of(client) for client in clients), key=_bytes)


def _bytes(request: Train) -> int:
    return sum(tensor.nbytes for tensor in request.bank.tensors.values())


def _tokens(examples: Sequence[Example]) -> int:
    """The tokens of a padded batch."""
    return len(examples) * max((len(example.ids) for example in examples), default=0)


def largest_batch(
    workplace: Workplace, clients: Sequence[ClientData], request: Train
) -> tuple[ClientData, list[Example]]:
    """The client whose longest rows make the largest batch, and that batch."""

    def longest(client: ClientData) -> list[Example]:
        examples = workplace.examples(client, "train")
        return sorted(examples, key=lambda example: -len(example.ids))[: request.optim.batch_size]

    return max(((client, longest(client)) for client in clients), key=lambda pair: _tokens(pair[1]))


def training_on(workplace: Workplace, client: ClientData, request: Train, examples: list[Example]) -> Training:
    """A training whose one step is on ``examples``."""
    optim = request.optim.model_copy(update={"steps": 1, "accumulate": 1})
    made = Training(workplace, client, 1, replace(request, optim=optim, hold_out=None, rows_of={}))
    made.steps, made.heads = [[examples]], [[0]]
    return made


def _longest_tested(workplace: Workplace, clients: Sequence[ClientData]) -> list[Example]:
    """The longest pass of evaluation; in multiple choice, of candidates."""
    passes: list[list[Example]] = []
    for client in clients:
        rows = workplace.examples(client, "test" if client.splits.get("test") else "train")
        tested = [candidate(row, at) for row in rows for at in range(len(row.choices))] or rows
        passes.append(sorted(tested, key=lambda row: -len(row.ids))[: workplace.eval_batch_size])
    return max(passes, key=_tokens)


def _seconds(
    workplace: Workplace, clients: Sequence[ClientData], request: Train, examples: list[Example],
    training: Footprint, tested: Footprint, together: int, clock: Callable[[], float],
) -> float:  # fmt: skip
    """A round of all clients one after another: their optimiser steps, and a pass over their test rows."""
    speed = measured_speed(workplace.device, workplace.precision, clock)
    largest, seconds = max(1, _tokens(examples)), 0.0
    most_tested = max(1, _tokens(_longest_tested(workplace, clients)))
    for client in clients:
        lengths = workplace.lengths(client, "train")
        mean = sum(lengths) / len(lengths) * min(len(lengths), request.optim.batch_size)
        passes = request.optim.steps_on(len(lengths)) * request.optim.accumulate
        seconds += passes * speed.seconds(training, mean / largest) / together
        test = workplace.lengths(client, "test")
        number = -(-len(test) // workplace.eval_batch_size)
        seconds += number * speed.seconds(tested, sum(test) / max(1, number) / most_tested)
    return seconds


def measured_speed(device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """How fast ``device`` is, measured for a moment on products of the size of a transformer's."""
    dtype = _DTYPES[precision]
    x, w = torch.ones(256, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
    wide, one = torch.ones(2**22, device=device), torch.ones(8, device=device)
    flops = 2 * x.numel() * w.shape[1] / _time(lambda: x @ w, device, clock)
    return Speed(flops, wide.nbytes / _time(lambda: wide + 1, device, clock), _time(lambda: one + 1, device, clock))


def _time(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """The mean seconds of ``work``, after a first one."""
    work()
    number, started = 0, clock()
    while (passed := clock() - started) < _MEASURED:
        work()
        number += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return passed / number


def _memory(device: torch.device) -> int:
    """The bytes that a run could take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) + int(psutil.Process().memory_info().rss)


def _advised(config: Config, made: Plan) -> Plan:
    """The plan with what to change, where it does not fit: the largest part first."""
    if made.fits:
        return made
    batch, model = config.train.batch_size, config.model
    accumulate = config.train.accumulate * 2
    smaller = f"set [train] batch_size = {-(-batch // 2)} and accumulate = {accumulate}" if batch > 1 else ""
    advice = {
        made.base: 'set [model] dtype = "bfloat16"' if model.dtype == "float32" and model.quantize == "none"
        else 'set [model] quantize = "nf4" (extra quant)' if model.quantize != "nf4" else "choose a smaller model",
        made.activations: smaller if model.gradient_checkpointing
        else "set [model] gradient_checkpointing = true" + (f", or {smaller}" if smaller else ""),
        made.logits: "set [engine] loss_chunk = 64 and a smaller [run] eval_batch_size",
        made.banks + made.optimiser: "lower [lora] rank, or adapt fewer [lora] targets",
    }  # fmt: skip
    return replace(made, advice=tuple(text for _, text in sorted(advice.items(), reverse=True) if text))
