"""How many clients share a forward pass: as many as make it faster, and as fit in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import psutil
import torch

from coterie import machine
from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.examples import Example
from coterie.data.rows import ClientData
from coterie.engines.gain import LEAST, PASS_TOKENS, batch_lengths, best_gain
from coterie.engines.grouping import Load, training_load
from coterie.methods.row_privacy import RowPrivacy
from coterie.requests import ClientProgram, Optim, Train
from coterie.types import Bank, ClientInfo, CoterieError

# Tokens of a step above which a larger batch is hardly faster on a CPU (docs/performance-batched.md); GPUs: no limit.
ENOUGH = {"bfloat16": 2000, "float32": 250}
MOST = 64
SHARE = 0.8  # of the free memory
_GROWN = 1.1  # measure again once the largest adapter is this many times as large as the one that was measured


@dataclass(frozen=True)
class Size:
    """The number of clients, why, and the bytes that each takes in a pass where they were measured."""

    clients: int
    reason: str
    each: float = 0.0


@dataclass
class AutoSize:
    """``clients_per_batch = "auto"``: ``now`` is what was decided last, for a largest client of ``weight`` bytes whose
    bank is ``bank`` bytes."""

    now: Size | None = None
    weight: float = 0.0
    bank: float = 0.0

    def decide(
        self,
        workplaces: Sequence[Workplace],
        clients: Sequence[ClientData],
        weight: float,
        request: Callable[[], Train | None],
        private: RowPrivacy | None = None,
    ) -> Size | None:
        """The new size for a round whose largest client has ``weight``; None if the size stays as it was.

        ``request`` returns the request of that client, or None if no client has one. ``private``: how training hides
        each row.
        """
        if self.now and weight <= _GROWN * self.weight:
            return None
        asked = request()
        if asked is None:
            return None
        before, bank = self.now, sum(tensor.nbytes for tensor in asked.bank.tensors.values())
        if before is None or not self._still_fits(before, workplaces, bank):
            sizes = [best_size(workplace, clients, asked, private) for workplace in workplaces]
            self.now, self.bank = min(sizes, key=lambda size: size.clients), bank
        self.weight = weight
        return self.now if before is None or (self.now and self.now.clients != before.clients) else None

    def _still_fits(self, size: Size, workplaces: Sequence[Workplace], bank: float) -> bool:
        """Whether as many clients fit if all that each takes grew as its bank did, which is more than it does. What
        passes gain does not depend on the bank, so nothing else need be decided again."""
        grown = size.clients * size.each * bank / max(self.bank, 1)
        free = min(_free(workplace.device) for workplace in workplaces)
        return size.clients == 1 or 0 < grown <= SHARE * free


def first_request(program: ClientProgram, bank: Callable[[], Bank], optim: Optim) -> Train:
    """The first request of ``program`` if it is to train, else a request to train all of ``bank``."""
    with closing(program):
        try:
            request = next(program)
        except StopIteration:
            request = None
    if isinstance(request, Train):
        return request
    whole = bank()
    return Train(whole, frozenset(whole.tensors), optim)


def best_size(
    workplace: Workplace, clients: Sequence[ClientData], request: Train, private: RowPrivacy | None = None
) -> Size:
    """The number that is fast, padding included, and fits, by the measured memory of a step of ``request`` with two
    clients, which is trained as ``private`` says. A step is as large as that of the client with the largest batch.
    """
    batch, lengths = request.optim.batch_size, dict[int, Sequence[int]]()
    for number, client in enumerate(clients):
        try:
            lengths[number] = workplace.lengths(client, "train")
        except CoterieError:  # a row that cannot be encoded fails its client later
            continue
    lengths = {number: each for number, each in lengths.items() if each}
    if len(lengths) < 2:
        return Size(1, "there is one client")
    size = Size(min(MOST, len(lengths)), f"at most {MOST}")
    if workplace.device.type == "cpu":
        load = training_load(workplace, request.optim)
        size = _worthwhile(size, [load(i, clients[i]) for i in lengths], lengths, batch, workplace.precision)
    if size.clients == 1:
        return size
    rows, longest = max(((min(batch, len(of)), max(of)) for of in lengths.values()), key=lambda of: of[0] * of[1])
    fits, each = _fits(workplace, request, rows, longest, private)
    if size.clients <= fits:
        return replace(size, each=each)
    return Size(fits, f"no more fit in {SHARE:.0%} of the free memory", each)


def _worthwhile(
    size: Size, loads: Sequence[Load], lengths: Mapping[int, Sequence[int]], batch: int, precision: str
) -> Size:
    """The number up to ``size`` that gains most on a processor; one where shared passes would gain too little."""
    pays = max(1, round(ENOUGH[precision] / statistics.fmean(load.rows * load.tokens for load in loads)))
    if pays < size.clients:
        size = Size(pays, f"{ENOUGH[precision]} tokens a step keep this processor busy")
    if size.clients == 1:
        return size
    of_batches = {number: batch_lengths(of, batch) for number, of in lengths.items()}
    best, gain = best_gain(loads, of_batches, size.clients, PASS_TOKENS[precision])
    if gain < LEAST:
        return Size(1, f"with rows padded to a common length, shared passes would be {gain:.2f} times as fast")
    return size if best == size.clients else Size(best, "more would pad more than they gain")


def _fits(
    workplace: Workplace, request: Train, rows: int, tokens: int, private: RowPrivacy | None
) -> tuple[int, float]:
    """How many clients' steps of ``rows`` rows and ``tokens`` tokens fit into the free memory, at least 1; and the
    bytes of each. Half of what two take is a little more than one takes: some of it is shared."""
    free = _free(workplace.device)  # before the step, because what it leaves in memory counts too
    try:
        each = max(_peak(workplace, request, rows, tokens, 2, private) / 2, 1)
    except torch.OutOfMemoryError:
        return 1, 0.0
    return max(1, int(SHARE * free / each)), each


def _peak(
    workplace: Workplace, request: Train, rows: int, tokens: int, clients: int, private: RowPrivacy | None = None
) -> int:
    """Bytes that one optimiser step takes beyond those in use before it."""
    made = [ClientData(ClientInfo(f"\0size {i}", rows), {}) for i in range(clients)]
    ids = (workplace.task.tokenizer.pad_token_id,) * tokens
    example = Example(ids, prompt=tokens // 2, choices=(ids[tokens // 2 :],) * 2)  # choices: those of a pair
    workplace = replace(workplace, report=lambda steps: None, references={})  # no client trains here
    for client in made:  # rows by hand, under ids that no folder can have
        workplace.cache[client.info.id, "train"] = [example] * rows
    optim = request.optim.model_copy(update={"steps": 1, "accumulate": 1, "batch_size": rows})
    once = replace(request, optim=optim, hold_out=None)
    hidden = None if private is None else replace(private, optim=optim, rows=rows)  # a step of all rows
    machine.release_memory()  # else the step could reuse memory that glibc keeps, and not be measured
    before = _used(workplace.device, reset=True)
    try:
        train_together([(LocalCompute(workplace, client, 1, private=hidden), once) for client in made])
    finally:
        for client in made:
            del workplace.cache[client.info.id, "train"]
    return _used(workplace.device) - before


def _free(device: torch.device) -> int:
    """Free bytes, including those that torch keeps for later use."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def _used(device: torch.device, reset: bool = False) -> int:
    """The largest number of bytes in use since the last ``reset``; with ``reset``, those in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        machine.reset_peak_memory()
        return int(psutil.Process().memory_info().rss)
    return machine.peak_memory()
