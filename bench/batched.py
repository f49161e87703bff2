"""Many clients in one forward pass against one client at a time: client-steps per second, and memory.

Training with a plain LoRA on the packaged encoder: each client takes the same steps with rows of its own, of equal
length, first one client after another, then several in a forward pass. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from _harness import arguments, interleaved, table, write

from coterie.data.rows import ClientData
from coterie.data.tasks import Classification, Example
from coterie.engines.batched import train_together
from coterie.engines.compute import LocalCompute
from coterie.engines.place import Workplace
from coterie.machine import peak_memory, reset_peak_memory
from coterie.nn.base import load_base
from coterie.ops.streams import kaiming_uniform, stream
from coterie.types import NO_EXPERT, Bank, ClientInfo, Key, Optim, Part, Train

RANK, STEPS = 8, 2


@dataclass(frozen=True)
class Case:
    """Rows and tokens of a client's batch, how many clients there are, and what is computed in."""

    rows: int
    tokens: int
    clients: int
    precision: str


def bank_of(place: Workplace, client: int) -> Bank:
    """A LoRA of the client's own on every target, and a head for two labels."""
    tensors = {}
    for target in place.base.spec.targets:
        draw = stream(client, "bench", target.name)
        tensors[Key(target.name, 0, Part.A)] = kaiming_uniform((RANK, target.d_in), draw)
        tensors[Key(target.name, 0, Part.B)] = torch.zeros(target.d_out, RANK)
    for part in place.base.spec.head:
        tensors[Key(part.name, NO_EXPERT, Part.HEAD)] = torch.zeros(part.shape_for(2))
    return Bank(tensors, scaling=2.0, dropout=0.05)


def asked_of(place: Workplace, case: Case) -> list[tuple[LocalCompute, Train]]:
    """What each client asks: STEPS optimiser steps over rows of random words."""
    optim, asked = Optim(batch_size=case.rows, epochs=1), []
    for number in range(case.clients):
        client = ClientData(ClientInfo(f"client-{number}", case.rows * STEPS, labels=("no", "yes")), {})
        ids = torch.randint(1000, 20000, (case.rows * STEPS, case.tokens), generator=stream(number, "rows")).tolist()
        place.cache[client.info.id, "train"] = [
            Example(tuple(row), (0,) * case.tokens, label=i % 2) for i, row in enumerate(ids)
        ]
        bank = bank_of(place, number)
        asked.append((LocalCompute(place, client, 1), Train(bank, frozenset(bank.tensors), optim)))
    return asked


def workplace(case: Case, device: str) -> Workplace:
    base = load_base("minilm", "classification", device=device)
    if case.precision == "bfloat16":  # as the engine does
        base.hold_linears(torch.bfloat16)
        base.use_attention("eager" if device == "cpu" else None)
    return Workplace(base, Classification(base.tokenizer, case.tokens), 0, precision=case.precision)


def runs_of(asked: list[tuple[LocalCompute, Train]], batches: list[int]) -> dict[str, Callable[[], Any]]:
    """The same work, by how many clients share a forward pass."""

    def alone() -> None:
        for compute, request in asked:
            compute.train(request)

    def together(size: int) -> None:
        for start in range(0, len(asked), size):
            train_together(asked[start : start + size])

    return {"1": alone, **{str(size): lambda size=size: together(size) for size in batches}}


def measure(case: Case, batches: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    place = workplace(case, device)
    asked = asked_of(place, case)

    def done(run: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return timed

    runs = {size: done(run) for size, run in runs_of(asked, batches).items()}
    times = interleaved({size: lambda run=run: run for size, run in runs.items()}, repeats, warmup=1)
    return [
        {
            "precision": case.precision,
            "rows": case.rows,
            "tokens": case.tokens,
            "clients": case.clients,
            "per_batch": int(size),
            "client_steps_per_second": case.clients * STEPS / times.median(size),
            "speedup": times.ratio("1", size),
            "speedup_of_cpu_time": times.cpu_ratio("1", size),
            "peak_mib": peak(case, int(size), device) / 2**20,
        }
        for size in runs
    ]


def peak(case: Case, size: int, device: str) -> int:
    """Bytes of a process of its own that does the work, above what it holds before it."""
    given = [str(value) for value in (case.rows, case.tokens, case.clients, case.precision, size)]
    command = [
        sys.executable,
        __file__,
        "--peak",
        *given,
        "--device",
        device,
        "--threads",
        str(torch.get_num_threads()),
    ]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


def print_peak(options: argparse.Namespace) -> None:
    rows, tokens, clients, precision, size = options.peak
    case = Case(int(rows), int(tokens), int(clients), precision)
    asked = asked_of(workplace(case, options.device), case)
    before = int(psutil.Process().memory_info().rss)
    reset_peak_memory()
    runs_of(asked, [int(size)] if size != "1" else [])[size]()
    found = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_memory() - before
    print(found)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.peak:
        print_peak(options)
        return
    sizes = [(b, t) for b in options.rows for t in options.tokens]
    clients, batches, repeats = options.clients, options.batches, options.repeats
    if options.quick:
        sizes, clients, batches, repeats = [(1, 8)], 2, [2], 1
    found: list[dict[str, Any]] = []
    for precision in options.precisions:
        for rows, tokens in sizes:
            found += measure(Case(rows, tokens, clients, precision), batches, repeats, options.device)
            if not options.quick:
                table("one client at a time (1) against many in a forward pass", found[-1 - len(batches) :])
    table("client-steps per second, peak memory of the training", found)
    write("batched", options, {"device": options.device, "steps": STEPS, "rank": RANK, "rows": found})


if __name__ == "__main__":
    main()
