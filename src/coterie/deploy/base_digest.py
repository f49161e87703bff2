"""The SHA-256 of a base's files: whether two machines have the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coterie.files import read_json, write_json

_WEIGHTS = ("*.safetensors", "*.bin")


def base_digest(path: str, cache: Path) -> str:
    """SHA-256 over the config and the weights of the base in the folder ``path``; if it is not a folder, over its name.

    Remembered in the file ``cache``, until the files change.
    """
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    files = sorted([folder / "config.json", *(file for glob in _WEIGHTS for file in folder.glob(glob))])
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    cached = read_json(cache, "delete it") if cache.exists() else {}
    if cached.get("files") == [str(folder), stamp]:
        return str(cached["sha256"])
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    write_json(cache, {"files": [str(folder), stamp], "sha256": total.hexdigest()})
    return total.hexdigest()
