"""The page at ``/``: pick a client, type a text, see the answer. One file, which fetches nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("coterie.api").joinpath("page.html").read_text(encoding="utf-8")
_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def policy_of(page: str) -> str:
    """The Content-Security-Policy of ``page``: its own style and script, by their hashes, and this service's routes."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {' '.join(hashes['style'])}",
            f"script-src {' '.join(hashes['script'])}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
