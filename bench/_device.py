"""Two probes of a device for ``gpu.py``: whether a training step waits for it, and a base in NF4.

``synchronisation``: 16 clients train together; in the steps between the first two and the last, the profiler's trace
must hold no call that waits for the device, and CUDA's own check must see none. ``nf4``: tokens per second and memory
of a training pass over a base of 4-bit Linears.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, table, write
from _models import path_of, synchronised
from batched import Case, asked_of, run_of

from coterie.compute.batched import train_together
from coterie.compute.workplace import Steps, Workplace
from coterie.data.tasks import Classification
from coterie.nn.base import load_base

# Calls of the CUDA runtime that wait; a copy from the device is one of them, unless it is asynchronous.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Watch:
    """Watches the steps of a training between the first two and the last two."""

    def __init__(self, device: str) -> None:
        self.cuda, self.steps = device.startswith("cuda"), 0
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.cuda else []
        self.profiler = torch.profiler.profile(activities=kinds)
        self.on = False

    def report(self, steps: Steps) -> None:
        """Called after every step."""
        if steps.taken == 2:
            self._switch(on=True)
        elif self.on and steps.taken == steps.of - 2:
            self._switch(on=False)
        self.steps += int(self.on and steps.taken > 2)

    def _switch(self, on: bool) -> None:
        if on and self.cuda:
            torch.cuda.synchronize()
        if on:
            self.profiler.start()
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")
        if not on:
            self.profiler.stop()
        self.on = on

    def waits(self) -> dict[str, int]:
        """The calls that wait, by name. The profiler itself waits for the whole device once, when it stops."""
        counts = {event.key: event.count for event in self.profiler.key_averages() if event.key in WAITS}
        if "cudaDeviceSynchronize" in counts:
            counts["cudaDeviceSynchronize"] -= 1
        return {name: count for name, count in counts.items() if count > 0}


def synchronisation(options: argparse.Namespace, path: str) -> dict[str, Any]:
    clients, rows, tokens, steps = (2, 1, 8, 8) if options.quick else (16, 2, 128, 12)
    watch = Watch(options.device)
    case = Case(rows, tokens, "bfloat16", options.device, path)
    workplace = _workplace(case, "none")
    run_of(asked_of(workplace, case, clients, 1), clients, options.device)()  # what is made once
    asked = asked_of(workplace, case, clients, steps)
    workplace.report = watch.report
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_together(asked)
    seen = sorted({str(w.message).splitlines()[0] for w in caught if "synchroniz" in str(w.message)})
    waits = watch.waits()
    total = sum(waits.values()) or len(seen)
    per_step = total / max(1, watch.steps) if watch.cuda else None
    return {"waits_per_step": per_step, "steps_watched": watch.steps, "waits": waits, "warnings": seen}


def nf4(options: argparse.Namespace, path: str) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed (extra quant)"}
    clients, rows, tokens = (2, 1, 8) if options.quick else (16, 4, 128)
    case = Case(rows, tokens, "bfloat16", options.device, path)
    workplace = _workplace(case, "nf4")
    run = run_of(asked_of(workplace, case, clients, 2), clients, options.device)
    run()
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    synchronised(run, options.device)()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return {"tokens_per_second": 2 * clients * rows * tokens / seconds, "peak_mib": peak, "clients": clients}


def _workplace(case: Case, quantize: Any) -> Workplace:
    dtype = torch.float32 if case.model == "minilm" else torch.bfloat16
    base = load_base(case.model, "classification", device=case.device, dtype=dtype, quantize=quantize)
    base.hold_linears(torch.bfloat16)
    return Workplace(base, Classification(base.tokenizer, case.tokens), 0, precision=case.precision)


PROBES = {"synchronisation": synchronisation, "nf4": nf4}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="llama-1b")


def main() -> None:
    options = arguments(__doc__ or "", add)
    with tempfile.TemporaryDirectory() as name, suppress(BrokenPipeError):
        found = PROBES[options.probe](options, path_of(options.model, Path(name), options.device))
        table(options.probe, [found])
        write(options.probe, options, found)


if __name__ == "__main__":
    main()
