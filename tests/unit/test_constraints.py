"""The pinned versions with hashes are those without."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", re.MULTILINE)


def pinned(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in _PINNED.findall(text)}


def test_every_package_but_torch_has_its_hashes() -> None:
    plain, hashed = pinned("constraints.txt"), pinned("constraints-hashed.txt")
    assert len(plain) > 100
    assert hashed == {package: version for package, version in plain.items() if package != "torch"}
    blocks = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "constraints-hashed.txt").read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(hashed)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)
