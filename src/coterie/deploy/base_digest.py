"""The SHA-256 of a base: whether two machines have the same model, and describe it in the same way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from coterie import codec
from coterie.config.sections import Config
from coterie.files import read_json_as, write_json
from coterie.nn.locate import folder_here, resolve, weight_files
from coterie.types import BaseSpec, CoterieError, Json

_BOOK = "base.json"


def files_digest(path: str, cache: Path) -> str:
    """SHA-256 over the config and the weights of a base on this machine; if it is not here, over its name.

    ``path`` is its folder or its name on the hub. Remembered in the file ``cache``, until the files change.
    """
    folder = folder_here(path)
    if folder is None:
        return hashlib.sha256(path.encode()).hexdigest()
    files = sorted([folder / "config.json", *(weight_files(path) or folder.glob("*.bin"))])
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    cached = read_json_as(cache, _CACHED, "delete it") if cache.exists() else None
    if cached and cached.files == [str(folder), stamp]:
        return cached.sha256
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    write_json(cache, {"files": [str(folder), stamp], "sha256": total.hexdigest()})
    return total.hexdigest()


def base_digest(files: str, spec: BaseSpec) -> str:
    """SHA-256 over the digest of a base's ``files`` and over what a run knows of the base: targets, sizes, head."""
    return hashlib.sha256(files.encode() + codec.encode(spec)).hexdigest()


def digest_here(config: Config, root: Path, folder: Path) -> str:
    """The digest of the base of ``config`` from its files on this machine; the files' is kept in ``folder``.

    Raises :class:`CoterieError` if the files are not here, or are not those of a model with these targets.
    """
    from coterie.nn.base import spec_at  # imports transformers

    path = resolve(config.model.path, root)
    if folder_here(path) is None:
        raise CoterieError(
            f"this machine does not have the base {config.model.path!r}, so it cannot tell which site describes it "
            "rightly; put the base here ([model] path), or set [federation] base to the SHA-256 that `coterie site "
            "check SITE.toml --config` prints at a site that you trust"
        )
    return base_digest(files_digest(path, folder / _BOOK), spec_at(path, config.task.kind, config.lora.targets))


@dataclass(frozen=True)
class _Cached:
    files: list[Json]
    sha256: str


_CACHED = TypeAdapter(_Cached)
