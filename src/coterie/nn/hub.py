"""Where the files of a base are: in its folder, in the hub's cache on this machine, or with the hub, asked once."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from coterie.types import CoterieError

_SECONDS = 10.0  # to wait for the hub's answer
# The hub's own HTTP error has that of its client's library as a base: requests, httpx or httpx2, by version.
_BASES = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
_HTTP_FAULTS: tuple[type[Exception], ...] = (OSError, *_BASES)
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def files_of(path: str, root: Path | None = None, weights: bool = True) -> str:
    """The folder of a base's files, or its name where the hub has to be asked for them, and answers.

    A cached base is not looked for on the hub. ``root`` is where a folder of that name would be. ``weights``: whether
    more than the config is needed. Raises :class:`CoterieError` that says what was tried.
    """
    if Path(path).is_dir():
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
        raise CoterieError(f"no model {path!r}: {folder}, and the hub knows no such names; {fix}") from fault
    except GatedRepoError as fault:
        raise CoterieError(f"the hub gives {path!r} to those it lets in: ask there, then `hf auth login`") from fault
    except RepositoryNotFoundError as fault:
        raise CoterieError(f"no model {path!r}: {tried}, and none on the hub that you may see; {fix}") from fault
    except _HTTP_FAULTS as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise CoterieError(f"no model {path!r}: {tried}, and from the hub: {reason}; {fix}") from fault
    return path


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has a tokenizer and all weights; a download may have been cut off."""
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        return False
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return True
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
    return False
