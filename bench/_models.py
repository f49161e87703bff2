"""Bases for the benches that a device may be lent for, and what a device does at best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from coterie.nn.base import Base
from coterie.nn.locate import resolve

LLAMAS: dict[str, dict[str, int]] = {  # random weights: speed and memory do not depend on them
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-small": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-tiny": {  # to try the way there
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
MODELS = ("minilm", *LLAMAS)


def path_of(name: str, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """What to load for a name of ``MODELS``; a Llama is made on ``device``, in ``dtype``, with minilm's tokenizer.

    It is written to the folder that ``COTERIE_BENCH_MODELS`` names, where several benches use it, or to ``folder``.
    """
    if name == "minilm":
        return name
    made = Path(os.environ.get("COTERIE_BENCH_MODELS", folder)) / name
    if not made.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
        pad, size = tokenizer.pad_token_id, len(tokenizer)
        config = LlamaConfig(vocab_size=size, pad_token_id=pad, bos_token_id=None, eos_token_id=None, **LLAMAS[name])
        config.dtype = dtype
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)  # the same base in every call, so that losses can be compared
            model = AutoModelForCausalLM.from_config(config)
        model.to(dtype).save_pretrained(made)
        tokenizer.save_pretrained(made)
    return str(made)


def synchronised(run: Callable[[], Any], device: str) -> Callable[[], None]:
    """``run``, and what it started on the device done."""

    def timed() -> None:
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return timed


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second in the best of a few large products."""
    size = 8192 if device.startswith("cuda") else 1536
    x, y = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    once = synchronised(lambda: x @ y, device)
    once()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def work_per_token(base: Base, tokens: int) -> float:
    """Operations per token of the base's forward and input-gradient pass, in rows of ``tokens``; banks not counted.

    4 for every weight of a Linear, 12 x tokens x width a layer for attention. A little too many: below the first
    bank no gradient is needed.
    """
    heads = {part.name.partition(".")[0] for part in base.spec.head}
    weights = sum(
        module.weight.numel()
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and not {*name.split(".")} & {"pooler", "lm_head", *heads}
    )
    config: Any = base.model.config
    return 4 * weights + 12 * tokens * config.hidden_size * config.num_hidden_layers


def profile(run: Callable[[], Any], device: str, most: int = 12) -> list[dict[str, Any]]:
    """Where the time of ``run`` goes: the operations with most time of their own, and their share."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        synchronised(run, device)()
    field = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1
    return [
        {"operation": e.key, "calls": e.count, "ms": getattr(e, field) / 1e3, "share": getattr(e, field) / total}
        for e in events[:most]
    ]
