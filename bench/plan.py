"""The plan of `coterie doctor --config` against what a run takes: the peak of a fresh process for each case.

Small decoders and encoders with random weights, sized so that a step takes a hundred megabytes and more. A process of
its own loads each, trains one step on the largest batch of any client and evaluates, as a run does; the peak of its
memory above what it held with the base loaded is compared with the plan's. Target: within 20% in every case.

Then it runs a whole round: every client trains and is evaluated. Its seconds, and those that the plan expects, are of
the processor, which other processes do not change (with ``--threads 1``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from _harness import arguments, table, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.loading import workplaces
from coterie.compute.preferences import scoring_of
from coterie.compute.score import score
from coterie.compute.train import train
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.engines.plan import largest_batch, largest_request, plan, training_on
from coterie.requests import Score

WORDS = 1000
DECODER = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 8192}
CASES: dict[str, tuple[str, dict[str, int], dict[str, dict[str, Any]]]] = {
    "decoder": ("llama", DECODER, {}),
    "wider, 2 layers": ("llama", {**DECODER, "hidden_size": 512, "num_hidden_layers": 2}, {}),
    "8 layers": ("llama", {**DECODER, "num_hidden_layers": 8}, {}),
    "16 rows": ("llama", DECODER, {"train": {"batch_size": 16}}),
    "vocabulary 32,768": ("llama", {**DECODER, "vocab_size": 32768}, {"engine": {"loss_chunk": 0}}),
    "loss_chunk": ("llama", {**DECODER, "vocab_size": 32768}, {"engine": {"loss_chunk": 128}}),
    "rank 64": ("llama", DECODER, {"lora": {"rank": 64, "alpha": 64.0}}),
    "checkpointing": ("llama", {**DECODER, "num_hidden_layers": 8}, {"model": {"gradient_checkpointing": True}}),
    "checkpointing, wider": (
        "llama", {**DECODER, "hidden_size": 512},
        {"model": {"gradient_checkpointing": True}, "engine": {"loss_chunk": 64}},
    ),
    "bfloat16": ("llama", DECODER, {"engine": {"precision": "bfloat16"}}),
    "packing": ("llama", DECODER, {"train": {"packing": True, "batch_size": 16}}),
    "experts": ("llama", DECODER, {"method": {"name": "fedamole"}}),
    "4 clients a pass": ("llama", DECODER, {"engine": {"clients_per_batch": 4}, "train": {"batch_size": 2}}),
    "encoder": ("bert", {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 8192}, {}),
    "encoder, checkpointing": (
        "bert", {"hidden_size": 384, "num_hidden_layers": 6, "vocab_size": 8192},
        {"model": {"gradient_checkpointing": True}},
    ),
}  # fmt: skip
QUICK = {"decoder": 32, "checkpointing": 32}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", help="names, separated by semicolons; default: all")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in QUICK if options.quick else options.cases.split(";") if options.cases else CASES:
            root = Path(folder) / name.replace(" ", "-")
            rows.append({"case": name, **compared(name, root, options.quick, options.threads)})
            print(json.dumps(rows[-1]), flush=True)
    table("memory of a step: the plan and a process", rows)
    write("plan", options, {"cases": rows})


def compared(name: str, root: Path, quick: bool, threads: int) -> dict[str, Any]:
    """The planned and the measured bytes of a case, in MiB."""
    make(root, name, quick)
    planned = plan(_config(root), root, time.process_time)
    command = [sys.executable, __file__, "--measure", str(root), "--threads", str(threads)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    real = json.loads(done.stdout.splitlines()[-1])
    return {
        "rows": planned.rows,
        "tokens": planned.tokens,
        "planned_mib": planned.step / 2**20,
        "measured_mib": real["step"] / 2**20,
        "ratio": planned.step / real["step"],
        "base_mib": planned.base / 2**20,
        "measured_total_mib": real["peak"] / 2**20,
        "gaps_mib": planned.gaps / 2**20,
        "planned_seconds": planned.seconds,
        "measured_seconds": real["seconds"],
    }


def make(root: Path, name: str, quick: bool) -> None:
    """The model, the data and the config of a case in the folder ``root``."""
    arch, sizes, sections = CASES[name]
    tokens = QUICK[name] if quick else 256
    model_of(arch, {**sizes, "hidden_size": 64, "vocab_size": 1024} if quick else sizes, root / "model")
    for client in range(4):
        folder = root / "clients" / f"client-{client}"
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            first = client + (0 if split == "train" else 4 * 24)
            lines = [json.dumps(_row(arch, tokens, first + 4 * row)) for row in range(24)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
    config: dict[str, Any] = {
        "model": {"path": "model", "max_length": tokens}, "data": {"folder": "clients"},
        "task": {"kind": "classification" if arch == "bert" else "generation"}, "method": {"name": "fedit"},
        "train": {"batch_size": 8, "steps": 1}, "engine": {"device": "cpu"}, "run": {"eval_batch_size": 4},
    }  # fmt: skip
    for section, keys in sections.items():
        config[section] = {**config.get(section, {}), **keys}
    (root / "config.json").write_text(json.dumps(config))


def model_of(arch: str, sizes: Mapping[str, int], folder: Path) -> None:
    """A random model, and a tokenizer of ``WORDS`` words."""
    shared = {"pad_token_id": 0, "intermediate_size": 3 * sizes["hidden_size"], "num_attention_heads": 8}
    shared |= {"max_position_embeddings": 512, **sizes}
    made: PretrainedConfig
    if arch == "bert":
        made, auto = BertConfig(**shared), AutoModel
    else:
        made, auto = LlamaConfig(**shared, num_key_value_heads=4, bos_token_id=1, eos_token_id=2), AutoModelForCausalLM
    auto.from_config(made).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": 4 + i for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _row(arch: str, tokens: int, number: int) -> dict[str, Any]:
    """A row of at most ``tokens``: every third is about as long, the others half of it."""
    words = [f"w{(number * 31 + i * 7) % WORDS}" for i in range((tokens if number % 3 == 0 else tokens // 2) - 8)]
    text, last = " ".join(words[: -len(words) // 2]), " ".join(words[-len(words) // 2 :])
    if arch == "bert":
        return {"text": f"{text} {last}", "label": number // 4 % 2}
    return {"prompt": text, "completion": last}


def _config(root: Path) -> Config:
    return check_config(json.loads((root / "config.json").read_text()))


def measured(root: Path) -> dict[str, float]:
    """What this process takes for a step and an evaluation: ``peak``, and ``step``, what of it came after the base. And
    the processor's ``seconds`` of a round afterwards."""
    config = _config(root)
    clients = load_data(config.data, config.task.kind, config.run.seed, root).clients
    (workplace,) = workplaces(config, root, {})
    workplace.all_clients.update({client.info.id: client for client in clients})
    request = largest_request(config, root, clients)
    client, examples = largest_batch(workplace, clients, request)
    together = config.engine.clients_per_batch
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    train([training_on(workplace, client, request, examples) for _ in range(int(together))])
    score([scoring_of(workplace, client, 1, Score([request.bank], "test"), request.bank)])
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    began, computes = time.process_time(), [LocalCompute(workplace, each, 1) for each in clients]
    for start in range(0, len(computes), int(together)):
        train_together([(compute, request) for compute in computes[start : start + int(together)]])
    for compute in computes:
        compute.score(Score([request.bank], "test"))
    return {"peak": peak, "step": peak - before, "seconds": time.process_time() - began}


if __name__ == "__main__":
    main()
