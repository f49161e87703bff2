"""Requests per second of `coterie api` for 1, 4 and 16 clients mixed: in shared passes, one at a time, and with PEFT.

All variants answer over HTTP on loopback, through the same application and to the same load: 16 requests at a time from
another process. They differ in the engine alone: rows of up to 16 requests in a pass; one row at a time; and PEFT's
``adapter_names``, 16 rows in a batch that is generated to its end. PEFT serves LoRAs alone; a routed bank of four
experts is ours only. `--soak SECONDS` instead sends good and bad requests to the command itself, with clients that hang
up, and records memory, answers and open files.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from _harness import arguments, interleaved, table, write
from _serve_load import bodies, load, soak
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coterie.adapters.about import About
from coterie.adapters.bundle import write_bundle
from coterie.api.app import make_app
from coterie.api.jobs import Encode, Encoded, Generate, Job, RequestError, Written
from coterie.api.keys import Keys
from coterie.api.limits import Limits
from coterie.api.prompts import prompt_ids
from coterie.api.served import Served, served
from coterie.api.server import Service, config_for, worker_for
from coterie.api.worker import Engine, Worker
from coterie.nn.base import Base, load_base
from coterie.nn.locate import resolve
from coterie.types import NO_EXPERT, Bank, GateSpec, Key, Part, TaskKind

RANK, EXPERTS, ROWS, LABELS = 8, 4, 16, ("a", "b", "c", "d")
TASKS = "classification,generation"
LIMITS = Limits(rows=ROWS, waiting=512, per_key=512)
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}


def make_base(folder: Path, task: TaskKind, quick: bool) -> str:
    """The packaged encoder, or a Llama of random weights with its tokenizer."""
    if task == "classification":
        return "minilm"
    made = folder / "llama"
    if not made.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
        sizes = {**SIZES, "hidden_size": 64, "num_hidden_layers": 2} if quick else SIZES
        config = LlamaConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
            initializer_range=0.2, num_key_value_heads=4, **sizes,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(made)
        tokenizer.save_pretrained(made)
    return str(made)


def make_run(folder: Path, task: TaskKind, path: str, clients: int, experts: int) -> Path:
    """The bundles of ``clients``: a LoRA each, or a routed bank."""
    base = load_base(path, task)
    gate = GateSpec("slot_top_k", {"own": 0}) if experts > 1 else GateSpec()
    for number in range(clients):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for target in base.spec.targets:
            for expert in range(experts):
                tensors[Key(target.name, expert, Part.A)] = torch.randn(RANK, target.d_in, generator=draw) / 20
                tensors[Key(target.name, expert, Part.B)] = torch.randn(target.d_out, RANK, generator=draw) / 20
            if experts > 1:
                router = torch.randn(2 * experts - 1, target.d_in, generator=draw) / 20
                tensors[Key(target.name, NO_EXPERT, Part.ROUTER)] = router
        for parameter in base.spec.head:
            shape = parameter.shape_for(len(LABELS))
            tensors[Key(parameter.name, NO_EXPERT, Part.HEAD)] = torch.randn(shape, generator=draw) / 20
        labels = LABELS if task == "classification" else None
        about = About("bench", 1, "last", task, "base", base.path, client=f"c{number}", labels=labels)
        write_bundle(folder / "clients" / f"c{number}", Bank(tensors, gate), about)
    return folder


@dataclass
class PeftEngine:
    """A PEFT model with an adapter per client; the rows of a batch name theirs."""

    base: Base
    names: Sequence[str]
    rows: int
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        targets = [target.name for target in self.base.spec.targets]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        self.model: Any = get_peft_model(self.base.model, config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        self.model.eval()

    @property
    def room(self) -> int:
        return self.rows - len(self.jobs)

    @property
    def busy(self) -> int:
        return len(self.jobs)

    def admit(self, job: Job) -> None:
        self.jobs.append(job)

    def drop(self, over: set[Job]) -> None:
        self.jobs = [job for job in self.jobs if job not in over]

    def fail(self, fault: RequestError) -> list[Job]:
        failed, self.jobs = self.jobs, []
        for job in failed:
            job.end(fault)
        return failed

    def step(self) -> list[Job]:
        jobs, self.jobs = self.jobs, []
        names = [self.names[job.request.client] for job in jobs]
        with torch.no_grad():
            (self._classify if isinstance(jobs[0].request, Encode) else self._write)(jobs, names)
        return jobs

    def _classify(self, jobs: list[Job], names: list[str]) -> None:
        texts = [job.request.texts[0][0] for job in jobs if isinstance(job.request, Encode)]
        inputs = self.base.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
        logits = self.model(**inputs, adapter_names=names).logits
        lengths = inputs["attention_mask"].sum(1).tolist()
        for job, row, length in zip(jobs, logits.softmax(-1).tolist(), lengths, strict=True):
            job.end((Encoded(tuple(row[: len(LABELS)]), length, False),))

    def _write(self, jobs: list[Job], names: list[str]) -> None:
        tokenizer = self.base.tokenizer
        requests = [job.request for job in jobs if isinstance(job.request, Generate)]
        prompts = [prompt_ids(tokenizer, request.prompt) for request in requests]
        most = [request.max_tokens or 1 for request in requests]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=max(most), do_sample=False
        )[:, width:]
        for job, row, prompt, number in zip(jobs, out, prompts, most, strict=True):
            text = tokenizer.decode(row[:number], skip_special_tokens=True)
            job.end(Written(text, "length", len(prompt), number))


@contextmanager
def running(models: Served, worker: Worker, run: Path) -> Iterator[str]:
    """The application on a free port. Yields its address."""
    app = make_app(models, worker, Keys(), LIMITS)
    server = uvicorn.Server(config_for(app, Service(run, port=0, limits=LIMITS)))
    sock = socket.create_server(("127.0.0.1", 0), backlog=512)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    worker.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


def measure(
    task: TaskKind, options: argparse.Namespace, folder: Path, pool: ProcessPoolExecutor
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a task, one for each engine, for one number of clients after another."""
    numbers = [1, 2] if options.quick else [int(number) for number in options.clients.split(",")]
    requests = 8 if options.quick else options.requests // (1 if task == "classification" else 2)
    path, route = make_base(folder, task, options.quick), "classify" if task == "classification" else "completions"
    with ExitStack() as stack:
        runs = {
            kind: make_run(folder / f"{task}-{kind}", task, path, max(numbers), experts)
            for kind, experts in (("lora", 1), ("routed", EXPERTS))
        }
        loaded = {kind: stack.enter_context(served(run)) for kind, run in runs.items()}
        names = loaded["lora"].names

        def ours(kind: str, rows: int) -> Callable[[], Worker]:
            return lambda: worker_for(loaded[kind], Limits(rows=rows, waiting=512))

        peft = PeftEngine(load_base(path, task), names, ROWS)
        workers: dict[str, tuple[str, Callable[[], Worker]]] = {
            "shared passes": ("lora", ours("lora", ROWS)),
            "one at a time": ("lora", ours("lora", 1)),
            "PEFT adapter_names": ("lora", lambda: Worker(_as_engine(peft), 512)),
            "shared passes, routed": ("routed", ours("routed", ROWS)),
            "one at a time, routed": ("routed", ours("routed", 1)),
        }
        addresses = {
            name: stack.enter_context(running(loaded[kind], make(), runs[kind]))
            for name, (kind, make) in workers.items()
        }
        for number in numbers:
            yield _rows(task, route, number, names, addresses, requests, options, pool)


def _as_engine(engine: PeftEngine) -> Engine:
    return engine


def _rows(
    task: str,
    route: str,
    number: int,
    names: Sequence[str],
    addresses: dict[str, str],
    requests: int,
    options: argparse.Namespace,
    pool: ProcessPoolExecutor,
) -> list[dict[str, Any]]:
    sent = bodies(route, list(names[:number]), requests)
    latencies: dict[str, list[float]] = {name: [] for name in addresses}

    def case(name: str) -> Callable[[], Callable[[], Any]]:
        def timed() -> None:
            latencies[name] = [*latencies[name], *pool.submit(load, addresses[name], route, sent, ROWS).result()]

        return lambda: timed

    repeats = 1 if options.quick else options.repeats
    times = interleaved({name: case(name) for name in addresses}, repeats, warmup=1)
    rows = []
    for name in addresses:
        seconds = latencies[name][requests:]  # without the warm-up
        rows.append(
            {
                "task": task,
                "clients": number,
                "engine": name,
                "requests_per_second": requests / times.median(name),
                "times_one_at_a_time": times.ratio(f"one at a time{', routed' if 'routed' in name else ''}", name),
                "times_peft": times.ratio("PEFT adapter_names", name),
                "p50_ms": 1e3 * statistics.median(seconds),
                "p95_ms": 1e3 * statistics.quantiles(seconds, n=20)[-1],
            }
        )
    return rows


def run_soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command itself under load: memory and open files of its process, and what became of every request."""
    run = make_run(folder / "soak", "generation", make_base(folder, "generation", True), 16, EXPERTS)
    command = [sys.executable, "-m", "coterie", "api", str(run), "--port", "0", "--per-key", "16", "--waiting", "16"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        ) as server,
    ):
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if line.startswith("open ")).split()[1]
            samples: list[dict[str, float]] = []
            done = threading.Event()
            watcher = threading.Thread(target=_watch, args=(psutil.Process(server.pid), samples, done))
            watcher.start()
            counts = soak(address, [f"c{number}" for number in range(16)], options.soak)
            done.set()
            watcher.join()
            time.sleep(2)
            metrics = httpx.get(f"{address}metrics").text
            idle = {
                line.split()[0]: float(line.split()[1])
                for line in metrics.splitlines()
                if line.startswith(
                    ("coterie_api_running", "coterie_api_waiting", "coterie_api_passes", "coterie_api_up")
                )
            }
            after = {"open_files": psutil.Process(server.pid).num_fds()}
        finally:
            server.terminate()
    logged = (folder / "log").read_text()
    lines = {"log_lines": len(logged.splitlines()), "log_errors": sum("failed" in line for line in logged.splitlines())}
    return {"seconds": options.soak, "counts": counts, "memory": samples, "after": {**after, **idle}, **lines}


def _watch(process: psutil.Process, samples: list[dict[str, float]], done: threading.Event) -> None:
    began = time.monotonic()
    while not done.wait(5):
        mib = process.memory_info().rss / 2**20
        samples.append(
            {"second": round(time.monotonic() - began), "mib": round(mib, 1), "open_files": process.num_fds()}
        )


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--soak", type=float, nargs="?", const=600.0, help="seconds of the soak (600), and no bench"
        )
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--requests", type=int, default=64, help="for a round of classification; half to generate")
        parser.add_argument("--clients", default="1,4,16", help="numbers of clients, separated by commas")
        parser.add_argument(
            "--tasks", default=TASKS, help="classification, generation; one alone has a file of its own"
        )

    options = arguments(__doc__ or "", add)
    with tempfile.TemporaryDirectory() as name:
        if options.soak:
            found = run_soak(options, Path(name))
            table("soak", [{"what": what, "requests": count} for what, count in found["counts"].items()])
            write("serve_soak", options, found)
            return
        rows: list[dict[str, Any]] = []
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            file = "serve" if options.tasks == TASKS else f"serve-{options.tasks}"
            for task in options.tasks.split(","):
                for measured in measure(task, options, Path(name), pool):
                    rows += measured
                    write(file, options, {"rows": rows})  # so far
        table("coterie api", rows)


if __name__ == "__main__":
    main()
