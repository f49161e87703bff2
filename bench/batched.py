"""Many clients in one forward pass against one client at a time: client-steps per second, and memory.

Training with a plain LoRA: each client takes the same steps with rows of its own, of equal length, first one client
after another, then several in a forward pass. A cell that would take more tokens a pass than ``--budget``, or more
than half of the free memory by the peak of one client, is not measured, and the table says why. Peak memory is that
of a process for each size of rows, in which the passes grow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from _harness import arguments, interleaved, table, write
from _models import MODELS, matrix_rate, path_of, profile, synchronised, work_per_token

from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.data.examples import Example
from coterie.data.rows import ClientData
from coterie.data.tasks import Classification
from coterie.machine import peak_memory, reset_peak_memory
from coterie.nn.base import load_base
from coterie.ops.streams import kaiming_uniform, stream
from coterie.requests import Optim, Train
from coterie.types import NO_EXPERT, Bank, ClientInfo, Key, Part

RANK, SHARE, GIB = 8, 0.5, 2**30


@dataclass(frozen=True)
class Case:
    """Rows and tokens of a client's batch, what is computed in and on, and the base."""

    rows: int
    tokens: int
    precision: str
    device: str
    model: str

    @property
    def step(self) -> int:
        """Tokens of a client's step."""
        return self.rows * self.tokens


def bank_of(workplace: Workplace, client: int) -> Bank:
    """A LoRA of the client's own on every target, and a head for two labels."""
    tensors = {}
    for target in workplace.base.spec.targets:
        draw = stream(client, "bench", target.name)
        tensors[Key(target.name, 0, Part.A)] = kaiming_uniform((RANK, target.d_in), draw)
        tensors[Key(target.name, 0, Part.B)] = torch.zeros(target.d_out, RANK)
    for part in workplace.base.spec.head:
        tensors[Key(part.name, NO_EXPERT, Part.HEAD)] = torch.zeros(part.shape_for(2))
    return Bank(tensors, scaling=2.0, dropout=0.05)


def asked_of(workplace: Workplace, case: Case, clients: int, steps: int) -> list[tuple[LocalCompute, Train]]:
    """What each client asks: optimiser steps over rows of random words."""
    optim, asked = Optim(batch_size=case.rows, epochs=1), []
    for number in range(clients):
        client = ClientData(ClientInfo(f"client-{number}", case.rows * steps, labels=("no", "yes")), {})
        ids = torch.randint(1000, 20000, (case.rows * steps, case.tokens), generator=stream(number, "rows")).tolist()
        workplace.cache[client.info.id, "train"] = [
            Example(tuple(row), (0,) * case.tokens, label=i % 2) for i, row in enumerate(ids)
        ]
        bank = bank_of(workplace, number)
        asked.append((LocalCompute(workplace, client, 1), Train(bank, frozenset(bank.tensors), optim)))
    return asked


def make_workplace(case: Case) -> Workplace:
    small = case.model == "minilm"
    dtype = torch.float32 if small else torch.bfloat16
    base = load_base(case.model, "classification", device=case.device, dtype=dtype)
    if case.precision == "bfloat16":  # as the engine does
        base.hold_linears(torch.bfloat16)
        base.use_attention("eager" if case.device == "cpu" else None)
    return Workplace(base, Classification(base.tokenizer, case.tokens), 0, precision=case.precision)


def run_of(asked: list[tuple[LocalCompute, Train]], size: int, device: str) -> Callable[[], None]:
    """The work of all clients, so many of them in a pass; one: the engine's own way for one at a time."""

    def alone() -> None:
        for compute, request in asked:
            compute.train(request)

    def together() -> None:
        for start in range(0, len(asked), size):
            train_together(asked[start : start + size])

    return synchronised(alone if size == 1 else together, device)


def measure(case: Case, sizes: list[int], budget: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of clients a pass, measured or not."""
    found = peaks(case, [size for size in sizes if size == 1 or size * case.step <= budget])
    limit, one = found["limit"], found["peaks"]["1"]
    measured = [size for size in sizes if str(size) in found["peaks"]]
    clients = max(measured)
    whole = clients * case.step
    steps = 2 if 2 * whole <= budget // 2 else 1
    workplace = make_workplace(case)
    asked = asked_of(workplace, case, clients, steps)
    run_of(asked[:1], 1, case.device)()
    runs = {str(size): run_of(asked, size, case.device) for size in measured}
    work, cases = steps * whole, {size: lambda run=run: run for size, run in runs.items()}
    times = interleaved(cases, repeats if work <= budget // 2 else min(repeats, 2), warmup=int(work <= budget // 4))
    rows, per_token = [], work_per_token(workplace.base, case.tokens)
    for size in sizes:
        row: dict[str, Any] = {"precision": case.precision, "rows": case.rows, "tokens": case.tokens, "per_pass": size}
        name = str(size)
        if size in measured:
            seconds = times.median(name)
            row["client_steps_per_second"] = clients * steps / seconds
            row["tokens_per_second"] = work / seconds
            row["speedup"] = times.ratio("1", name)
            row["speedup_of_cpu_time"] = times.cpu_ratio("1", name)
            row["tflops"] = per_token * work / seconds / 1e12
            row["peak_mib"] = found["peaks"][name] / 2**20
        elif size * one > limit:
            row["not_measured"] = f"needs {size * one / GIB:.0f} GiB"
        else:
            row["not_measured"] = f"{size * case.step:,} tokens a pass: above the budget"
        rows.append(row)
    return rows


def peaks(case: Case, sizes: list[int]) -> dict[str, Any]:
    """Bytes of a pass with so many clients above what is held before, as far as half of the free memory reaches."""
    task = json.dumps({"case": asdict(case), "sizes": sizes, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, __file__, "--peaks", task], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_peaks(task: dict[str, Any]) -> None:
    """:func:`peaks` in this process."""
    torch.set_num_threads(task["threads"])
    case, found = Case(**task["case"]), dict[str, int]()
    workplace = make_workplace(case)
    cuda = case.device.startswith("cuda")
    run_of(
        asked_of(workplace, Case(1, 4, case.precision, case.device, case.model), 1, 1), 1, case.device
    )()  # touch it all
    asked = asked_of(workplace, case, max(task["sizes"]), 1)
    limit = SHARE * (torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available)
    before = torch.cuda.memory_allocated() if cuda else int(psutil.Process().memory_info().rss)
    for size in sorted(task["sizes"]):
        if found and size * found["1"] > limit:
            break
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_memory()
        run_of(asked[:size], size, case.device)()
        found[str(size)] = (torch.cuda.max_memory_allocated() if cuda else peak_memory()) - before
    print(json.dumps({"peaks": found, "limit": limit}))


def profiled(case: Case, size: int) -> list[dict[str, Any]]:
    """Where the time of a pass goes."""
    asked = asked_of(make_workplace(case), case, size, 2)
    run = run_of(asked, size, case.device)
    run()
    return profile(run, case.device)


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for a table: what was not measured says why."""
    columns = ("client_steps_per_second", "speedup", "speedup_of_cpu_time", "of_matrix_rate", "peak_mib")
    return [
        {name: row[name] for name in ("precision", "rows", "tokens", "per_pass")}
        | {name: row.get(name, "-") for name in columns}
        | ({columns[0]: row["not_measured"]} if "not_measured" in row else {})
        for row in rows
    ]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="minilm", choices=MODELS, help="a Llama is random, in bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="clients a pass")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=2**15, help="the most tokens of a pass that is measured")
    parser.add_argument("--profile", type=int, default=16, help="clients of a pass of 4 x 32 to profile; 0: none")
    parser.add_argument("--peaks", help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.peaks:
        print_peaks(json.loads(options.peaks))
        return
    sizes, batches, where = [(b, t) for b in options.rows for t in options.tokens], options.batches, options.device
    if options.quick:
        sizes, batches, options.repeats, options.budget, options.profile = [(1, 8)], [1, 2, 64], 1, 64, 0
    found: list[dict[str, Any]] = []
    profiles: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        path = path_of(options.model, Path(name), options.device)
        for precision in options.precisions:
            for rows, tokens in sizes:
                case = Case(rows, tokens, precision, where, path)
                found += measure(case, batches, options.budget, options.repeats)
                if not options.quick:
                    table("one client at a time (1) against many in a forward pass", shown(found[-len(batches) :]))
            if options.profile:
                profiles[precision] = profiled(Case(4, 32, precision, where, path), options.profile)
                table(f"where a pass's time goes, {precision}", profiles[precision])
    best = {each: matrix_rate(where, getattr(torch, each)) / 1e12 for each in options.precisions}
    for row in found:
        if "tflops" in row:
            row["of_matrix_rate"] = row["tflops"] / best[row["precision"]]
    table("client-steps per second, peak memory of the training", shown(found))
    about = {"device": where, "model": options.model, "rank": RANK, "budget": options.budget, "matrix_tflops": best}
    write("batched", options, {**about, "rows": found, "profiles": profiles})


if __name__ == "__main__":
    main()
