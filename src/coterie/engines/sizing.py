"""How many clients share a forward pass: as many as pay, and no more than the memory holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from coterie import machine
from coterie.data.rows import ClientData
from coterie.data.tasks import Example
from coterie.engines.batched import train_together
from coterie.engines.compute import LocalCompute
from coterie.engines.place import Workplace
from coterie.types import NO_EXPERT, Bank, ClientInfo, Key, Optim, Part, Tensors, Train

# Tokens of a step from which a larger batch is hardly faster on a CPU: docs/performance.md. A GPU takes what fits.
ENOUGH = {"bfloat16": 2000, "float32": 500}
MOST = 64
SHARE = 0.8  # of the free memory


@dataclass(frozen=True)
class Size:
    """The number of clients, and why."""

    clients: int
    reason: str


def best_size(place: Workplace, clients: Sequence[ClientData], optim: Optim, rank: int) -> Size:
    """As many clients as pay, and as fit by the measured memory of a step with one client and with two."""
    lengths = {c.info.id: [len(e.ids) for e in place.examples(c, "train")] for c in clients if c.splits.get("train")}
    if len(lengths) < 2:
        return Size(1, "there is one client")
    most, reason = min(MOST, len(lengths)), f"at most {MOST}"
    if place.device.type == "cpu":
        tokens = [statistics.fmean(each) * min(optim.batch_size, len(each)) for each in lengths.values()]
        pays = max(1, round(ENOUGH[place.precision] / statistics.fmean(tokens)))
        if pays < most:
            most, reason = pays, f"{ENOUGH[place.precision]} tokens a step keep this processor busy"
    if most == 1:
        return Size(1, reason)
    fits = _fits(place, optim, rank, max(map(max, lengths.values())))
    return Size(most, reason) if most <= fits else Size(fits, f"{SHARE:.0%} of the free memory hold so many")


def _fits(place: Workplace, optim: Optim, rank: int, tokens: int) -> int:
    """How many clients' steps with the longest rows fit into the free memory; at least 1."""
    free = _free(place.device)  # before the first of the two: what that leaves behind is in both
    try:
        one, two = (_peak(place, optim, rank, tokens, clients) for clients in (1, 2))
    except torch.OutOfMemoryError:
        return 1
    each = max(two - one, 1)
    return max(1, 1 + int((SHARE * free - one) / each))


def _peak(place: Workplace, optim: Optim, rank: int, tokens: int, clients: int) -> int:
    """Bytes that one optimiser step takes beyond what is held before it."""
    bank = Bank(_tensors(place, rank))
    made = [ClientData(ClientInfo(f"\0size {i}", optim.batch_size), {}) for i in range(clients)]
    example = Example((place.task.tokenizer.pad_token_id,) * tokens, prompt=tokens // 2)
    for client in made:  # rows by hand, under ids that no folder can have
        place.cache[client.info.id, "train"] = [example] * optim.batch_size
    once = Train(bank, frozenset(bank.tensors), optim.model_copy(update={"steps": 1, "accumulate": 1}))
    before = _used(place.device, reset=True)
    try:
        train_together([(LocalCompute(place, client, 1), once) for client in made])
    finally:
        for client in made:
            del place.cache[client.info.id, "train"]
    return _used(place.device) - before


def _tensors(place: Workplace, rank: int) -> Tensors:
    """A plain LoRA on every target and a head for two labels, all zeros."""
    found = {}
    for target in place.base.spec.targets:
        found[Key(target.name, 0, Part.A)] = torch.zeros(rank, target.d_in)
        found[Key(target.name, 0, Part.B)] = torch.zeros(target.d_out, rank)
    head = {Key(p.name, NO_EXPERT, Part.HEAD): torch.zeros(p.shape_for(2)) for p in place.base.spec.head}
    return {**found, **head}


def _free(device: torch.device) -> int:
    """Bytes that may still be taken, those that torch keeps for later use among them."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def _used(device: torch.device, reset: bool = False) -> int:
    """The largest number of bytes in use since the last ``reset``; with one, those in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        machine.reset_peak_memory()
        return int(psutil.Process().memory_info().rss)
    return machine.peak_memory()
