"""Who may import whom: reads every import of the package and holds DESIGN.md's directions.

Function-level imports, imports under TYPE_CHECKING and ``import_module`` with a literal name count as imports.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

import coterie

ROOT = Path(coterie.__file__).parent

# Unit (a file or folder at the top of the package): the other units that it may import. The outermost see everything,
# and nothing that is named here sees them.
MAY_IMPORT = {
    "types": set(),
    "machine": set(),
    "doctor": {"machine"},
    "files": {"types"},
    "codec": {"types"},
    "ops": {"types"},
    "method": {"types", "methods"},  # methods: the registry looks into their package, by name
    "pool": {"types", "files", "codec"},
    "methods": {"types", "codec", "method", "ops", "pool"},
    "nn": {"types", "machine", "ops"},
    "data": {"types", "ops"},
    "evaluate": {"types", "ops"},
    "engine": {"types", "method"},
    "deployment": {"types", "data"},
    "wording": set(),
    "config": {"types", "method", "data", "deployment", "wording"},
    "engines": {
        "types",
        "files",
        "codec",
        "ops",
        "method",
        "nn",
        "data",
        "evaluate",
        "engine",
        "config",
        "machine",
        "checks",
    },
    "checks": {"types", "engine"},
    "checkpoint": {"types", "files", "codec"},
    "runner": {"types", "files", "codec", "ops", "method", "machine", "evaluate", "engine", "checks", "checkpoint"},
    "run_folder": {"types", "files", "config", "checkpoint"},
    "export": {"types", "files", "codec"},
    "adapters": {"types", "nn", "pool"},
    "summary": {"types", "machine", "evaluate"},
    "tables": {"types"},
    "plots": set(),
    "assignment": {"types"},
    "report_assignment": {"types", "assignment", "plots", "tables"},
    "report_quotas": {"types", "plots"},
    "report": {"types", "files", "assignment", "plots", "report_assignment", "report_quotas", "tables"},
    "tracking": {"types", "runner"},
}
OUTERMOST = {"__main__", "cli", "cli_pool", "federate", "federation", "compare", "demo", "progress"}

# Heavy or replaceable libraries: the files and folders that may import them.
ONLY_IN = {
    "huggingface_hub": {"nn"},
    "transformers": {"nn", "data/tasks.py", "export.py"},
    "peft": {"nn", "export.py", "adapters.py"},
    "bitsandbytes": {"nn"},
    "datasets": {"data/sources"},
    "typer": {"cli.py", "cli_pool.py", "federation/commands.py"},
    "cryptography": {"federation/keys.py"},
    "starlette": {"engines/flower.py"},
}
ONE_FILE_ONLY = "flwr"


class Import(NamedTuple):
    """An import of ``name`` (dotted) on a line of a file of the package."""

    file: str
    line: int
    name: str

    @property
    def unit(self) -> str:
        return Path(self.file).parts[0].removesuffix(".py")

    @property
    def target(self) -> str | None:
        """The unit of ours that is imported, if it is ours; the package itself (its version) is none."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == "coterie" and len(parts) > 1 else None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports_of(root: Path) -> list[Import]:
    """Every import in every file under ``root``, a folder laid out as the package is."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), file)
        found += [Import(file, line, name) for line, name in _imports(tree, file, root)]
    return found


def _imports(tree: ast.AST, file: str, root: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for name in _from(node, file, root))
        elif isinstance(node, ast.Call) and _is_import_call(node.func) and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def _from(node: ast.ImportFrom, file: str, root: Path) -> list[str]:
    """The modules that a ``from`` statement imports: ``from coterie import codec`` is an import of coterie.codec."""
    module = node.module or ""
    if node.level:
        here = ("coterie", *Path(file).parts[:-1])
        above = here[: len(here) - node.level + 1]
        module = ".".join([*above, *([module] if module else [])])
    if module != "coterie":
        return [module]
    ours = [alias.name for alias in node.names if _is_module(root / alias.name)]
    return [f"coterie.{name}" for name in ours] or [module]


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def faults(imports: list[Import]) -> list[str]:
    """Every import that breaks a rule, with the rule."""
    found = []
    for item in imports:
        allowed = MAY_IMPORT.get(item.unit)
        if allowed is not None and item.target is not None and item.target not in {*allowed, item.unit}:
            found.append(f"{item}; {item.unit} may import {', '.join(sorted(allowed)) or 'nothing of ours'}")
        places = ONLY_IN.get(item.name.split(".")[0])
        if places is not None and not any(item.file == p or item.file.startswith(f"{p}/") for p in places):
            found.append(f"{item}; it belongs in {', '.join(sorted(places))}")
    users = sorted({item.file for item in imports if item.name.split(".")[0] == ONE_FILE_ONLY})
    if len(users) > 1:
        found.append(f"{ONE_FILE_ONLY} is imported in {', '.join(users)}; one file may")
    if any(Path(user).parts[0] != "engines" for user in users):
        found.append(f"{ONE_FILE_ONLY} is imported in {', '.join(users)}; an engine may")
    return found


def test_the_package_keeps_to_its_directions() -> None:
    imports = imports_of(ROOT)
    assert faults(imports) == []
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    covered = {item.file for item in imports}
    assert len(files) >= 15
    assert len(covered) >= 15
    # Only files without any import may be missing from what was checked: packages' docstrings.
    assert {Path(file).name for file in files - covered} <= {"__init__.py"}


def test_every_unit_has_a_rule_or_is_outermost() -> None:
    units = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    units |= {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert len(units) >= 20
    assert units == MAY_IMPORT.keys() | OUTERMOST
    assert MAY_IMPORT.keys().isdisjoint(OUTERMOST)
    assert set().union(*MAY_IMPORT.values()) <= MAY_IMPORT.keys()


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    declared = {re.split("[<>=]", line)[0] for line in [*project["dependencies"], *extras]}
    provided = packages_distributions()
    imported = {item.name.split(".")[0] for item in imports_of(ROOT)} - {"coterie", *sys.stdlib_module_names}
    assert {"torch", "sklearn", "click"} <= imported
    for name in sorted(imported):
        distributions = {found.lower().replace("_", "-") for found in provided.get(name, [name])}
        assert distributions & declared, f"{name} is imported, but pyproject.toml declares none of {distributions}"


def test_the_directions_have_no_cycle_but_the_registrys() -> None:
    order: list[str] = []
    rest = {unit: set(allowed) for unit, allowed in MAY_IMPORT.items()}
    rest["method"].remove("methods")
    while ready := [unit for unit, allowed in rest.items() if allowed <= set(order)]:
        order += sorted(ready)
        rest = {unit: allowed for unit, allowed in rest.items() if unit not in ready}
    assert rest == {}
    assert order[:3] == ["machine", "plots", "types"]


BAD = [
    ("types.py", "from coterie.ops.mean import mean"),
    ("ops/mean.py", "from coterie.nn.bank import BankLayer"),
    ("ops/mean.py", "from coterie import codec"),
    ("methods/fedit.py", "import coterie.nn.attach"),
    ("methods/fedit.py", "from coterie.engines import local"),
    ("methods/fedit.py", "from ..data import tasks"),
    ("methods/fedit.py", "from .. import nn"),
    ("methods/fedit.py", "def f():\n    from coterie.data import tasks"),
    ("methods/fedit.py", "if TYPE_CHECKING:\n    from coterie.nn import bank"),
    ("methods/fedit.py", "bank = importlib.import_module('coterie.nn.bank')"),
    ("methods/fedit.py", "import transformers"),
    ("methods/fedit.py", "from coterie.adapters import build_pool"),
    ("pool.py", "from coterie.adapters import build_pool"),
    ("adapters.py", "from coterie.engines.compute import LocalCompute"),
    ("methods/_common.py", "from peft import LoraConfig"),
    ("methods/fedit.py", "import flwr.app"),
    ("nn/bank.py", "from coterie.method import Plan"),
    ("nn/bank.py", "from coterie.engines.compute import train"),
    ("data/rows.py", "from coterie.nn.base import load_base"),
    ("data/rows.py", "from transformers import AutoTokenizer"),
    ("engines/local.py", "from coterie.methods.fedit import FedIT"),
    ("engines/local.py", "from coterie.runner import run"),
    ("engines/local.py", "from coterie import cli"),
    ("runner.py", "from coterie.methods import fedit"),
    ("runner.py", "from coterie.nn.attach import attach"),
    ("runner.py", "from coterie.engines.local import LocalEngine"),
    ("runner.py", "import coterie.engines"),
    ("codec.py", "from coterie.method import drive"),
    ("engines/compute.py", "from coterie.doctor import examine"),
    ("machine.py", "from coterie.types import Json"),
    ("plots/heat.py", "from coterie.tables import show"),
    ("assignment.py", "from coterie.plots import natural"),
    ("report_assignment.py", "from coterie.report import Run"),
    ("report_quotas.py", "from coterie.pool import read_pool"),
    ("report.py", "from coterie.runner import Runner"),
    ("summary.py", "from coterie.federate import federate"),
    ("export.py", "from coterie.nn.base import load_base"),
    ("tracking.py", "from coterie import cli"),
]
GOOD = [
    ("methods/fedit.py", "from coterie.methods._common import start_lora"),
    ("methods/fedit.py", "from ._common import start_lora"),
    ("methods/fedit.py", "from coterie import __version__"),
    ("methods/fedit.py", "import coterie_extras.nn\nimport torch.nn"),
    ("data/tasks.py", "from transformers import AutoTokenizer"),
    ("engines/flower.py", "from flwr.app import Message"),
    ("engines/compute.py", "from coterie.machine import native_bfloat16"),
    ("cli.py", "from coterie import nn, engines"),
]


def planted(root: Path, file: str, source: str) -> list[str]:
    for unit in [*MAY_IMPORT, *OUTERMOST]:
        path = root / unit
        if unit in {"ops", "methods", "nn", "data", "engines", "plots"}:
            path.mkdir()
        else:
            path.with_suffix(".py").write_text("", encoding="utf-8")
    (root / file).write_text(source, encoding="utf-8")
    return faults(imports_of(root))


@pytest.mark.parametrize(("file", "source"), BAD, ids=[f"{file}: {source}" for file, source in BAD])
def test_a_planted_import_is_found(tmp_path: Path, file: str, source: str) -> None:
    (fault,) = planted(tmp_path, file, source)
    assert file in fault


@pytest.mark.parametrize(("file", "source"), GOOD, ids=[f"{file}: {source}" for file, source in GOOD])
def test_an_allowed_import_is_not(tmp_path: Path, file: str, source: str) -> None:
    assert planted(tmp_path, file, source) == []


def test_flower_belongs_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "flower.py").write_text("import flwr", encoding="utf-8")
    (fault,) = planted_beside(tmp_path, "engines/grid.py", "from flwr.app import Message")
    assert fault == "flwr is imported in engines/flower.py, engines/grid.py; one file may"


def planted_beside(root: Path, file: str, source: str) -> list[str]:
    (root / file).write_text(source, encoding="utf-8")
    return faults(imports_of(root))
