"""Loads what all clients of a process share, once for each device that ``[engine]`` names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from coterie.compute.workplace import Workplace
from coterie.config.sections import Config
from coterie.data.chat import check_template
from coterie.data.dpo import Dpo
from coterie.data.rows import ClientData, FederatedData
from coterie.data.tasks import Task, make_task
from coterie.data.truncation import Truncation, truncation_of_all
from coterie.machine import devices, native_bfloat16
from coterie.methods.registry import method_named
from coterie.nn.base import Base, load_base
from coterie.nn.compiled import compile_frozen
from coterie.nn.locate import files_of, resolve
from coterie.nn.packs import check_packs
from coterie.nn.placement import Placement, is_offloaded
from coterie.nn.pretrained import PreTrainedTokenizerBase, load_tokenizer
from coterie.ops.sampling import Sampling
from coterie.ops.scores import score_named
from coterie.types import CoterieError

_HELD = (
    "parts of the base are loaded for every pass, and a training pass holds them until its end; with [model] "
    "gradient_checkpointing = true it holds one layer's at a time"
)
# settings of [engine] that do not change a base
_NOT_LOADED = {"clients_per_batch": 1, "threads": 0, "loss_chunk": 0, "joules_per_tflop": 0.0}


def workplaces(config: Config, root: Path, cache: dict[str, object]) -> tuple[Workplace, ...]:
    """A workplace on every device, all with the same tokens; bases stay in ``cache`` for runs with the same model."""
    if config.task.generate:
        for name in config.task.scores:
            score_named(name)
    names = device_names(config.engine.device)
    engine = config.engine.model_copy(update=_NOT_LOADED)
    key = str(("base", config.model, config.lora.targets, config.task.kind, engine, root))
    if key not in cache:
        cache[key] = _bases(config, root, names)
    bases = cast(tuple[Base, ...], cache[key])
    _check_positions(config, bases[0])
    _check_rank(config.plan().max_rank, bases[0])
    task = _task(config, bases[0].tokenizer)
    first = Workplace(
        bases[0],
        task,
        config.run.seed,
        precision=_precision(config, bases),
        loss_chunk=config.engine.loss_chunk,
        joules_per_tflop=config.engine.joules_per_tflop,
    )
    if config.train.packing:
        for base in bases:
            with replace(first, base=base).autocast():
                check_packs(base)
    if is_offloaded(bases[0].model) and not config.model.gradient_checkpointing:
        first.note(_HELD)
    rows = config.run.eval_batch_size
    return tuple(replace(first, base=base, eval_batch_size=eval_rows(rows, base.device)) for base in bases)


def eval_rows(setting: int | Literal["auto"], device: torch.device) -> int:
    """The rows of an evaluation pass on ``device``.

    On a CPU, ``auto`` keeps batches small: their rows are of similar length, so little is padding. On a GPU a pass of
    few rows costs as much as one of many.
    """
    if setting == "auto":
        return 16 if device.type == "cpu" else 64
    return setting


def simulated_workplaces(
    config: Config, federation: FederatedData, root: Path, cache: dict[str, object]
) -> tuple[Workplace, ...]:
    """:func:`workplaces` for all clients of ``federation``, with everyone's rows for a method that trains on them."""
    loaded = workplaces(config, root, cache)
    if method_named(config.method_name).needs_all_rows:
        for workplace in loaded:
            workplace.all_clients = {data.info.id: data for data in federation.clients}
    return loaded


def truncation_of(config: Config, federation: FederatedData, root: Path) -> Truncation:
    """What ``[model] max_length`` cuts off the rows of all clients, in a process that has no base.

    As :func:`~coterie.data.truncation.truncation_of_all`.
    """
    tokenizer = load_tokenizer(files_of(resolve(config.model.path, root), root, weights=False))
    task = _task(config, _with_template(tokenizer, config, root))

    def of(client: ClientData, split: str) -> Truncation:
        return Truncation.of([task.encode(row) for row in client.splits[split]])

    return truncation_of_all(federation.clients, of)


def _task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    task, length = config.task, config.model.max_length
    dpo = Dpo(task.beta, task.reference) if task.objective == "dpo" else None
    sampling, new = Sampling(task.temperature, task.top_p), task.max_new_tokens
    return make_task(task.kind, tokenizer, length, new, task.generate, task.turns, task.scores, dpo, sampling)


def task_for(config: Config, tokenizer: PreTrainedTokenizerBase, root: Path) -> Task:
    """The task of ``config`` with a tokenizer that has not got ``[model] chat_template`` yet."""
    return _task(config, _with_template(tokenizer, config, root))


def chat_template_of(config: Config, root: Path) -> str:
    """The text of ``[model] chat_template``; "" without one. Raises :class:`CoterieError` for one that is not valid."""
    if config.model.chat_template is None:
        return ""
    path = root / Path(config.model.chat_template).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise CoterieError(f"[model] chat_template: cannot read {path} ({fault})") from fault
    check_template(text, str(path))
    return text


def device_names(setting: str | tuple[str, ...]) -> tuple[str, ...]:
    """The devices that ``[engine] device`` names. Raises :class:`CoterieError` for a GPU that is named twice."""
    if setting == "auto":
        return ("cuda" if torch.cuda.is_available() else "cpu",)
    if setting == "cuda:all":
        return tuple(name for name in devices() if name.startswith("cuda")) or (
            "cuda",
        )  # raises an error later if there is none
    if isinstance(setting, str):
        return (setting,)
    twice = [name for name, count in Counter(setting).items() if count > 1 and name != "cpu"]
    if twice:
        raise CoterieError(f"[engine] device names {twice[0]} twice; name each device once")
    return setting


def _bases(config: Config, root: Path, names: tuple[str, ...]) -> tuple[Base, ...]:
    bases = tuple(_load(config, root, name) for name in names)
    precision = _precision(config, bases)
    for base in bases:
        prepare(base, config, precision)
        if config.engine.compile:
            compile_frozen(base)
    return bases


def prepare(base: Base, config: Config, precision: str) -> None:
    """Set the dtype of the base's Linears and the implementation of its attention as ``[engine]`` has them."""
    if precision == "bfloat16":
        base.hold_linears(torch.bfloat16)
    if config.engine.attention != "auto":
        base.use_attention(config.engine.attention)
    elif base.device.type == "cpu" and precision == "bfloat16" and config.model.max_length <= 256:
        base.use_attention("eager")  # torch's fused attention takes 1.5x as long there: docs/decisions/0008


def _check_rank(rank: int, base: Base) -> None:
    """Raises :class:`CoterieError` for a rank above the smaller side of a target: a product B A has no higher one."""
    smallest = min(base.spec.targets, key=lambda target: min(target.d_in, target.d_out))
    limit = min(smallest.d_in, smallest.d_out)
    if rank > limit:
        raise CoterieError(
            f"rank {rank} is more than {smallest.name} can use, a Linear of {smallest.d_in} to {smallest.d_out}; lower "
            f"[lora] rank or ranks to {limit} or less"
        )


def _check_positions(config: Config, base: Base) -> None:
    needed = config.model.max_length + (config.task.max_new_tokens if config.task.generate else 0)
    if base.longest is not None and needed > base.longest:
        raise CoterieError(
            f"the model has positions for {base.longest} tokens; [model] max_length (and [task] max_new_tokens) "
            f"need {needed}; lower them"
        )


def _load(config: Config, root: Path, device: str) -> Base:
    base = load_base(
        resolve(config.model.path, root),
        config.task.kind,
        targets=config.lora.targets,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype],
        quantize=config.model.quantize,
        device=device,
        gradient_checkpointing=config.model.gradient_checkpointing,
        root=root,
        placement=placement_of(config),
    )
    _with_template(base.tokenizer, config, root)
    return base


def placement_of(config: Config) -> Placement | None:
    """Where ``[model]`` puts the parts of the base; None: all of it is on one device."""
    model = config.model
    return None if model.device_map is None else Placement(model.device_map, model.max_memory)


def _with_template(tokenizer: PreTrainedTokenizerBase, config: Config, root: Path) -> PreTrainedTokenizerBase:
    """``tokenizer`` with the chat template of ``[model] chat_template``, if there is one."""
    if template := chat_template_of(config, root):
        tokenizer.chat_template = template
    return tokenizer


def _precision(config: Config, bases: tuple[Base, ...]) -> str:
    """The precision of all devices: ``auto`` is bfloat16 where each of them supports it natively."""
    precisions = {resolve_precision(config.engine.precision, base.device) for base in bases}
    return precisions.pop() if len(precisions) == 1 else "float32"


def resolve_precision(setting: str, device: torch.device) -> str:
    """``auto`` as the best precision that the device supports natively; any other setting as it is."""
    if setting != "auto":
        return setting
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else native_bfloat16()
    return "bfloat16" if native else "float32"
