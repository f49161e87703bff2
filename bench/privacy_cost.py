"""What hiding every row costs in training: time of a step and peak memory, one client at a time and in shared passes.

Clients train on the packaged encoder with rows of random words, of equal length: plainly (``plain``), and with
``[privacy] unit = "example"`` (``rows``), each one client after another (``alone``) and all in the same passes
(``together``). A step of ``rows`` draws each row by itself: on average as many as a plain step has, sometimes more than
a pass takes, and another number for each client. Its noise is that of a real run. Ratios are to ``plain, alone`` in the
same turn, by the clock and by processor time. Peak memory is above what is held before, in a process for each way.

    python bench/privacy_cost.py --threads 1      # half an hour of a core
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from _harness import arguments, interleaved, table, write

from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.examples import Example
from coterie.data.rows import ClientData
from coterie.data.tasks import Classification
from coterie.machine import peak_memory, release_memory, reset_peak_memory
from coterie.methods.row_privacy import RowPrivacy
from coterie.nn.base import load_base
from coterie.ops.noise import SecureNoise
from coterie.ops.streams import kaiming_uniform, stream
from coterie.requests import Optim, Train
from coterie.types import NO_EXPERT, Bank, ClientInfo, GateSpec, Key, Part

RANK, MULTIPLIER, LOTS = 8, 1.0, 8  # a client has LOTS times the rows of a step
WAYS = ("plain, alone", "plain, together", "rows, alone", "rows, together")
SIZES = ((2, 16), (8, 32), (8, 128))  # rows and tokens of a step
BANKS = {"one LoRA": 1, "mixture of 4": 4}  # FedIT's; FedLEASE's, of which a client trains one, router and head


@dataclass(frozen=True)
class Case:
    """Clients, the experts of a bank, rows and tokens of a step, and steps."""

    clients: int
    experts: int
    rows: int
    tokens: int
    steps: int


def bank_of(workplace: Workplace, case: Case, client: int) -> tuple[Bank, frozenset[Key]]:
    """A client's bank, and what of it trains."""
    tensors = {}
    for target in workplace.base.spec.targets:
        for expert in range(case.experts):
            draw = stream(client, "bench", target.name, expert)
            tensors[Key(target.name, expert, Part.A)] = kaiming_uniform((RANK, target.d_in), draw)
            tensors[Key(target.name, expert, Part.B)] = torch.zeros(target.d_out, RANK)
        if case.experts > 1:
            draw = stream(client, "bench", target.name, "router")
            router = kaiming_uniform((2 * case.experts - 1, target.d_in), draw)
            tensors[Key(target.name, NO_EXPERT, Part.ROUTER)] = router
    for part in workplace.base.spec.head:
        tensors[Key(part.name, NO_EXPERT, Part.HEAD)] = torch.zeros(part.shape_for(2))
    own = client % case.experts
    gate = GateSpec("slot_top_k", {"own": own}) if case.experts > 1 else GateSpec()
    trained = frozenset(key for key in tensors if key.part not in (Part.A, Part.B) or key.expert == own)
    return Bank(tensors, gate, scaling=2.0), trained


def asked_of(workplace: Workplace, case: Case, private: bool) -> list[tuple[LocalCompute, Train]]:
    """What each client asks: the steps of a round."""
    optim, number, asked = Optim(batch_size=case.rows, steps=case.steps), LOTS * case.rows, []
    for c in range(case.clients):
        client = ClientData(ClientInfo(f"client-{c}", number, labels=("no", "yes")), {})
        ids = torch.randint(1000, 20000, (number, case.tokens), generator=stream(c, "rows")).tolist()
        examples = [Example(tuple(row), (0,) * case.tokens, label=i % 2) for i, row in enumerate(ids)]
        workplace.cache[client.info.id, "train"] = examples
        bank, trained = bank_of(workplace, case, c)
        hidden = RowPrivacy(1.0, MULTIPLIER, SecureNoise(), optim, number) if private else None
        asked.append((LocalCompute(workplace, client, 1, private=hidden), Train(bank, trained, optim)))
    return asked


def work(workplace: Workplace, case: Case, way: str) -> Callable[[], None]:
    """The training of all clients, ready to run once."""
    asked = asked_of(workplace, case, way.startswith("rows"))

    def alone() -> None:
        for compute, request in asked:
            compute.train(request)

    def together() -> None:
        if faults := [made for made in train_together(asked) if isinstance(made, Exception)]:
            raise faults[0]

    return alone if way.endswith("alone") else together


def make_workplace(tokens: int) -> Workplace:
    base = load_base("minilm", "classification", dtype=torch.float32)
    return Workplace(base, Classification(base.tokenizer, tokens), 0)


def measure(case: Case, bank: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each way."""
    workplace = make_workplace(case.tokens)
    cases = {way: lambda way=way: work(workplace, case, way) for way in WAYS}
    times = interleaved(cases, repeats, warmup=1)  # type: ignore[arg-type]
    peaks = {way: peak(case, way) for way in WAYS}
    return [
        {
            "bank": bank,
            "rows": case.rows,
            "tokens": case.tokens,
            "way": way,
            "ms_per_client_step": 1000 * times.median(way) / case.clients / case.steps,
            "time": times.ratio(way, WAYS[0]),
            "processor_time": times.cpu_ratio(way, WAYS[0]),
            "peak_mib": peaks[way] / 2**20,
            "memory": peaks[way] / peaks[WAYS[0]],
        }
        for way in WAYS
    ]


def peak(case: Case, way: str) -> int:
    """Bytes that the training takes at most above what is held before, in a process of its own."""
    task = json.dumps({"case": asdict(case), "way": way, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, __file__, "--peak", task], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.splitlines()[-1])


def print_peak(task: dict[str, Any]) -> None:
    """:func:`peak` in this process."""
    torch.set_num_threads(task["threads"])
    case = Case(**task["case"])
    workplace = make_workplace(case.tokens)
    work(workplace, replace(case, clients=2, rows=1, steps=1), task["way"])()  # touch it all
    run = work(workplace, case, task["way"])
    release_memory()  # else the training could reuse what glibc keeps, and it would not be measured
    before = int(psutil.Process().memory_info().rss)
    reset_peak_memory()
    run()
    print(peak_memory() - before)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.peak:
        print_peak(json.loads(options.peak))
        return
    banks, sizes, steps = BANKS, SIZES, 4
    if options.quick:
        banks, sizes, steps = {"mixture of 4": 4}, SIZES[:1], 1
        options.clients, options.repeats = 2, 1
    found = []
    for bank, experts in banks.items():
        for rows, tokens in sizes:
            found += measure(Case(options.clients, experts, rows, tokens, steps), bank, options.repeats)
    table("a step's cost, ratios to plain training one client at a time", found)
    about = {"model": "minilm", "rank": RANK, "clients": options.clients, "steps": steps}
    write("privacy_cost", options, {**about, "multiplier": MULTIPLIER, "repeats": options.repeats, "rows_of": found})


if __name__ == "__main__":
    main()
