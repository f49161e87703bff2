"""Reads PEFT adapter folders and builds a pool of them. The counterpart is :mod:`coterie.adapters.write`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from coterie.adapters.about import is_here, read_about
from coterie.adapters.pool import Adapter, Pool, name_of
from coterie.adapters.write import CONFIG_FILE, WEIGHTS_FILE
from coterie.nn.locate import resolve
from coterie.nn.pretrained import bare_linears
from coterie.nn.quiet import quiet_bitsandbytes
from coterie.nn.weights import digests, endings
from coterie.text import name_fault, parse_json
from coterie.types import CoterieError, Json, Key, Part

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "base_model.model."
_LARGEST_ALPHA = 1e6
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")

# Keys of adapter_config.json that say where an adapter came from or where it sits, but do not change what its tensors
# compute. Every other key must have the value that it has in a plain LoRA.
_HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("auto_mapping", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "modules_to_save", "runtime_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "ensure_weight_tying"),
}
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that change the base's weights too
_WHY = {
    "use_dora": "DoRA rescales the whole weight by learned magnitudes, which a sum of rank-1 experts cannot do",
    "bias": "it trains biases of the base, which are not low-rank",
    "lora_bias": "it adds a bias to B, which is not low-rank",
    "trainable_token_indices": "it trains rows of the embedding, which are not low-rank",
    "layer_replication": "it repeats layers of the base, which changes the model",
    "target_parameters": "it adapts parameters outside Linear layers",
    "alora_invocation_tokens": "it is active only after an invocation token, which a gate per token cannot express",
}


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds: A and B by (module as the base names it, part), with the scale folded into B."""

    tensors: Mapping[tuple[str, Part], Tensor]
    base: str
    source: str
    sha256: str
    licence: str | None
    left_out: tuple[str, ...]


def experts_of(run: Path, named: bool = False) -> list[str]:
    """The folders of a run's experts, which are adapters, as sources for :func:`build_pool`.

    ``named`` after the run too: experts of several runs may have the same names.

    Raises :class:`CoterieError` for a folder without any.
    """
    folders = sorted(path.parent for path in (run / "experts").glob(f"*/{CONFIG_FILE}"))
    if not folders:
        raise CoterieError(
            f"{run} has no experts to make a pool from; give the folder of a finished run whose server has "
            "experts, such as FedLEASE's or FedIT's"
        )
    return [f"{run.resolve().name}-{folder.name}={folder}" if named else str(folder) for folder in folders]


def build_pool(sources: Sequence[str], base: str | None = None) -> Pool:
    """A pool of the adapters in ``sources`` (``FOLDER`` or ``NAME=FOLDER``) for ``base``, by default their own.

    Raises :class:`CoterieError` for an adapter that rank-1 experts cannot represent or that does not fit the base, for
    adapters of different bases, for a name that occurs twice, and where ``sources`` is empty.
    """
    named = [_named(source) for source in sources]
    if not named:
        raise CoterieError("a pool needs at least one adapter; give folders after --adapters")
    if twice := sorted({name for name, _ in named if [n for n, _ in named].count(name) > 1}):
        raise CoterieError(f"two adapters are named {twice[0]!r}; give them other names with NAME=FOLDER")
    if fault := next((fault for name, _ in named if (fault := name_fault(name))), None):
        raise CoterieError(f"an adapter's name {fault}; give it another with NAME=FOLDER")
    read = {name: read_adapter(folder) for name, folder in named}
    path = resolve(base or _common_base(read))
    sizes = bare_linears(path)
    adapters: list[Adapter] = []
    tensors: dict[Key, Tensor] = {}
    first = 0
    for name, folder in read.items():
        fitted = _under_base_names(name, folder, sizes, path)
        ranks = {module: a.shape[0] for (module, part), a in fitted.items() if part is Part.A}
        record = Adapter(
            name, first, max(ranks.values()), ranks, folder.source, folder.sha256, folder.base, folder.licence,
            folder.left_out,
        )  # fmt: skip
        tensors |= {Key(module, first, part): value for (module, part), value in fitted.items()}
        adapters.append(record)
        first += record.rank
    tensors = dict(sorted(tensors.items()))
    weights = digests(path, sorted({key.module for key in tensors}))
    return Pool(path, tuple(adapters), tensors, name_of(tensors), weights)


def read_adapter(folder: Path) -> AdapterFolder:
    """The LoRA in a PEFT adapter folder.

    Raises :class:`CoterieError` for any other folder, for pickle files, and for a variant of LoRA that a sum of rank-1
    experts B_i A_i x cannot represent.
    """
    config, blob = _config(folder), _weights(folder)
    _check_config(folder, config)
    try:
        raw = load(blob)
    except SafetensorError as fault:
        raise CoterieError(f"{folder / WEIGHTS_FILE} is damaged: {fault}") from fault
    parts, other = _split(folder, raw)
    tensors: dict[tuple[str, Part], Tensor] = {}
    for module in sorted({module for module, _ in parts}):
        a, b = (parts.get((module, part)) for part in (Part.A, Part.B))
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CoterieError(f"{folder}: {module} needs an A [r, d_in] and a B [d_out, r] whose ranks match")
        tensors[module, Part.A] = a.float().contiguous()
        tensors[module, Part.B] = (b.float() * _scale(folder, config, module, a.shape[0])).contiguous()
    if not tensors:
        raise CoterieError(f"{folder} holds no LoRA: {WEIGHTS_FILE} has neither lora_A nor lora_B")
    left_out = _left_out(folder, config, other)
    digest = hashlib.sha256(blob).hexdigest()
    about = read_about(folder)
    here = about.base_path if about and is_here(about) else ""
    base = here or (about.base if about else str(config.get("base_model_name_or_path") or ""))
    return AdapterFolder(tensors, base, str(folder.resolve()), digest, _licence(folder), left_out)


def _named(source: str) -> tuple[str, Path]:
    name, has_name, folder = source.partition("=")
    path = Path(folder if has_name else source).expanduser()
    return (name if has_name else path.resolve().name), path


def _common_base(read: Mapping[str, AdapterFolder]) -> str:
    bases = {adapter.base: name for name, adapter in read.items()}
    if len(bases) > 1:
        (one, first), (other, second) = list(bases.items())[:2]
        raise CoterieError(
            f"{first} was trained on the base {one!r}, {second} on {other!r}; a pool is for one base. If both "
            "name the same model, choose one with --base"
        )
    (base,) = bases
    if not base:
        raise CoterieError("the adapters do not name the base they were trained on; name it with --base")
    return base


_KINDS: dict[str, type[dict[str, Json]] | type[list[Json]]] = {
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "modules_to_save": list,
}
_JSON = {dict: "object", list: "list"}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise CoterieError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}") from fault
    except ValueError as fault:
        raise CoterieError(f"{path} is not valid JSON: {fault}") from fault
    if not isinstance(config, dict):
        raise CoterieError(f"{path} must hold a JSON object")
    for key, kind in _KINDS.items():
        if not isinstance(config.get(key) or kind(), kind):
            raise CoterieError(f"{path}: {key} is {str(config[key])[:80]!r}, not a JSON {_JSON[kind]}")
    return config


def _weights(folder: Path) -> bytes:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path.read_bytes()
    if pickled := [name for name in _PICKLES if (folder / name).exists()]:
        raise CoterieError(
            f"{folder} has its weights in {pickled[0]}, a pickle file, which may run code when it is read; ask its "
            f"author for {WEIGHTS_FILE}"
        )
    raise CoterieError(f"{folder} has no {WEIGHTS_FILE}")


def _check_config(folder: Path, config: Mapping[str, Json]) -> None:
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise CoterieError(f"{folder} is an adapter of type {kind}; only LORA can be cut into rank-1 experts")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_BASE):
        raise CoterieError(
            f"{folder}: init_lora_weights = {start!r} also changed the base's weights; convert the adapter to a plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if key in _HARMLESS or value in (None, False, "none", [], {}):
            continue
        why = _WHY.get(key, "Coterie does not know what this option does")
        raise CoterieError(f"{folder}: {key} = {value!r}; {why}")


def _split(folder: Path, raw: Mapping[str, Tensor]) -> tuple[dict[tuple[str, Part], Tensor], list[str]]:
    """A and B by module and part, and the names of all other tensors."""
    parts: dict[tuple[str, Part], Tensor] = {}
    other = []
    for name, value in raw.items():
        inner = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(inner)
        if match:
            key = match["module"], Part(match["part"])
            if key in parts:
                raise CoterieError(
                    f"{folder} holds more than one lora_{key[1].value} of {key[0]}; keep one of its LoRAs"
                )
            parts[key] = value
        else:
            other.append(inner)
    return parts, other


def _left_out(folder: Path, config: Mapping[str, Json], other: Sequence[str]) -> tuple[str, ...]:
    """The names of a classification head's modules among an adapter's other tensors. Raises for anything else."""
    heads = tuple(sorted({str(name) for name in config.get("modules_to_save") or ()}))
    alien = [n for n in other if not any(part in heads for part in n.split("."))]
    if alien:
        raise CoterieError(f"{folder} holds {alien[0]}, which is not part of a LoRA ({len(alien)} such tensors in all)")
    if other and config.get("task_type") != "SEQ_CLS":
        raise CoterieError(
            f"{folder} trained all of {', '.join(heads)} (modules_to_save), which rank-1 experts cannot represent. "
            "Only a classification head (task_type SEQ_CLS) can be left out"
        )
    return heads if other else ()


def _scale(folder: Path, config: Mapping[str, Json], module: str, rank: int) -> float:
    """The adapter's scale on a module: alpha / r, or alpha / sqrt(r) with rslora; the patterns override r and alpha."""
    quiet_bitsandbytes()  # which peft imports
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        stated = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha"))
    except re.error as fault:
        raise CoterieError(f"{folder}: rank_pattern or alpha_pattern is not a regular expression: {fault}") from fault
    if stated != rank or not isinstance(alpha, (int, float)):
        raise CoterieError(f"{folder}: {module} has rank {rank}; {CONFIG_FILE} says r = {stated}, alpha = {alpha}")
    if rank < 1:
        raise CoterieError(f"{folder}: {module} has rank {rank}, so it holds no LoRA; train the adapter again")
    if not abs(alpha) <= _LARGEST_ALPHA:
        raise CoterieError(f"{folder}: the alpha of {module} is not within {_LARGEST_ALPHA:g}; check {CONFIG_FILE}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _licence(folder: Path) -> str | None:
    """The licence that the front matter of the adapter's model card names, if any."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    match = re.search(r"^licen[sc]e:\s*(\S.*?)\s*$", head[1], re.MULTILINE) if head else None
    return match[1].strip("'\"") if match else None


def _under_base_names(
    name: str, adapter: AdapterFolder, sizes: Mapping[str, tuple[int, int]], path: str
) -> dict[tuple[str, Part], Tensor]:
    """The adapter's tensors under the bare base's names. Raises where a module is missing there or has another size."""
    fitted = {}
    for (module, part), value in adapter.tensors.items():
        bare = next((m for m in endings(module) if m in sizes), None)
        if bare is None:
            raise CoterieError(f"{name} adapts {module!r}, but the base {path} has no such Linear outside its head")
        d_in, d_out = sizes[bare]
        if value.shape[1 if part is Part.A else 0] != (d_in if part is Part.A else d_out):
            raise CoterieError(
                f"{name} does not fit the base {path}: {bare} is a Linear of {d_in} to {d_out}, its {part.value} is "
                f"{list(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise CoterieError(f"{name}: {part.value} of {bare} has values that are not finite")
        fitted[bare, part] = value
    return fitted
