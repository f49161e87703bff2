"""How many clients share a forward pass: as many as make it faster, and as fit in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import psutil
import torch

from coterie import machine
from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.data.tasks import Example
from coterie.requests import ClientProgram, Optim, Train
from coterie.types import Bank, ClientInfo, CoterieError

# Tokens of a step above which a larger batch is hardly faster on a CPU (docs/performance-batched.md); GPUs: no limit.
ENOUGH = {"bfloat16": 2000, "float32": 250}
MOST = 64
SHARE = 0.8  # of the free memory
_GROWN = 1.1  # measure again once the largest adapter is this many times as large as the one that was measured


@dataclass(frozen=True)
class Size:
    """The number of clients, and why."""

    clients: int
    reason: str


@dataclass
class AutoSize:
    """``clients_per_batch = "auto"``: ``now`` is what was decided last, for adapters of at most ``weight`` bytes."""

    now: Size | None = None
    weight: float = 0.0

    def decide(
        self,
        workplaces: Sequence[Workplace],
        clients: Sequence[ClientData],
        weight: float,
        request: Callable[[], Train | None],
    ) -> Size | None:
        """The new size for a round whose largest client has ``weight``; None if the size stays as it was.

        ``request`` returns the request of that client, or None if no client has one.
        """
        if self.now and weight <= _GROWN * self.weight:
            return None
        asked = request()
        if asked is None:
            return None
        before, self.weight = self.now, weight
        self.now = min(
            (best_size(workplace, clients, asked) for workplace in workplaces), key=lambda size: size.clients
        )
        return self.now if before is None or self.now.clients != before.clients else None


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


def best_size(workplace: Workplace, clients: Sequence[ClientData], request: Train) -> Size:
    """The number that is fast and fits, by the measured memory of a step of ``request`` with one client and with two.

    A step is as large as that of the client with the largest batch.
    """
    batch, lengths = request.optim.batch_size, []
    for client in clients:
        try:
            lengths.append(workplace.lengths(client, "train"))
        except CoterieError:  # a row that cannot be encoded fails its client later
            continue
    lengths = [each for each in lengths if each]
    if len(lengths) < 2:
        return Size(1, "there is one client")
    most, reason = min(MOST, len(lengths)), f"at most {MOST}"
    if workplace.device.type == "cpu":
        tokens = [statistics.fmean(each) * min(batch, len(each)) for each in lengths]
        pays = max(1, round(ENOUGH[workplace.precision] / statistics.fmean(tokens)))
        if pays < most:
            most, reason = pays, f"{ENOUGH[workplace.precision]} tokens a step keep this processor busy"
    if most == 1:
        return Size(1, reason)
    rows, longest = max(((min(batch, len(each)), max(each)) for each in lengths), key=lambda of: of[0] * of[1])
    fits = _fits(workplace, request, rows, longest)
    return Size(most, reason) if most <= fits else Size(fits, f"no more fit in {SHARE:.0%} of the free memory")


def _fits(workplace: Workplace, request: Train, rows: int, tokens: int) -> int:
    """How many clients' steps of ``rows`` rows and ``tokens`` tokens fit into the free memory; at least 1."""
    free = _free(workplace.device)  # before the first step, because both peaks include what that step leaves in memory
    try:
        one, two = (_peak(workplace, request, rows, tokens, clients) for clients in (1, 2))
    except torch.OutOfMemoryError:
        return 1
    each = max(two - one, 1)
    return max(1, 1 + int((SHARE * free - one) / each))


def _peak(workplace: Workplace, request: Train, rows: int, tokens: int, clients: int) -> int:
    """Bytes that one optimiser step takes beyond those in use before it."""
    made = [ClientData(ClientInfo(f"\0size {i}", rows), {}) for i in range(clients)]
    example = Example((workplace.task.tokenizer.pad_token_id,) * tokens, prompt=tokens // 2)
    for client in made:  # rows by hand, under ids that no folder can have
        workplace.cache[client.info.id, "train"] = [example] * rows
    optim = request.optim.model_copy(update={"steps": 1, "accumulate": 1, "batch_size": rows})
    once = replace(request, optim=optim, hold_out=None)
    machine.release_memory()  # else the step could reuse memory that glibc keeps, and not be measured
    before = _used(workplace.device, reset=True)
    try:
        train_together([(LocalCompute(workplace, client, 1), once) for client in made])
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
