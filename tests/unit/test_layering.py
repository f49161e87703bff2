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

# The folders and files at the top of the package, from top to bottom: each may import what is below it, and nothing
# beside or above it.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"api"},
    {"deploy"},
    {"artifacts"},
    {"comparison"},
    {"experiment"},
    {"report"},
    {"runs"},
    {"engines"},
    {"flower"},
    {"compute"},
    {"config"},
    {"methods"},
    {"adapters"},
    {"inference"},
    {"nn", "data"},
    {"ops", "secure"},
    {"codec", "files", "energy", "lifetime", "machine", "plugins", "units"},
    {"requests", "text"},
    {"types"},
)
# What these may not import although it is below them: they know what a request or a bank is, not how it is computed.
UNSEEN = {
    "methods": {"nn", "data"},
    "runs": {"compute", "flower", "adapters", "nn"},
    "report": {"engines", "compute", "nn"},
}

# Heavy or replaceable libraries: the folders and files that may import them.
ONLY_IN = {
    "flwr": {"flower"},
    "ray": {"flower"},
    "starlette": {"flower", "api"},
    "fastapi": {"api"},
    "uvicorn": {"api"},
    "huggingface_hub": {"nn/locate.py", "artifacts/card.py", "artifacts/push.py"},
    "transformers": {"nn/pretrained.py"},
    "peft": {"adapters/read.py"},
    "bitsandbytes": {"nn/pretrained.py"},
    "datasets": {"data/sources"},
    "typer": {"cli"},
    "pandas": {"artifacts/history.py"},
    "cryptography": {"deploy/keys.py", "secure"},
}


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
    depth = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
    found = []
    for item in imports:
        if item.unit in depth and item.target in depth and item.target != item.unit:
            if depth[item.target] <= depth[item.unit]:
                found.append(f"{item}; {item.target} is not below {item.unit}")
            elif item.target in UNSEEN.get(item.unit, ()):
                found.append(f"{item}; {item.unit} does without {item.target}")
        places = ONLY_IN.get(item.name.split(".")[0])
        if places is not None and not any(item.file == p or item.file.startswith(f"{p}/") for p in places):
            found.append(f"{item}; it belongs in {', '.join(sorted(places))}")
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


def test_every_unit_has_its_layer() -> None:
    units = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    units |= {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert len(units) >= 20
    assert units == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(units)


PROVIDERS = {"mlflow": "mlflow-skinny"}  # of what may not be installed


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    declared = {re.split("[<>=]", line)[0] for line in [*project["dependencies"], *extras]}
    provided = packages_distributions()
    imported = {item.name.split(".")[0] for item in imports_of(ROOT)} - {"coterie", *sys.stdlib_module_names}
    assert {"torch", "scipy", "click"} <= imported
    for name in sorted(imported):
        distributions = {found.lower().replace("_", "-") for found in provided.get(name, [PROVIDERS.get(name, name)])}
        assert distributions & declared, f"{name} is imported, but pyproject.toml declares none of {distributions}"


BAD = [
    ("types.py", "from coterie.ops.mean import mean"),
    ("ops/mean.py", "from coterie.nn.bank import BankLayer"),
    ("codec.py", "from coterie import files"),
    ("methods/fedit.py", "import coterie.nn.attach"),
    ("methods/fedit.py", "from coterie.engines import local"),
    ("methods/fedit.py", "from ..data import tasks"),
    ("methods/fedit.py", "from .. import nn"),
    ("methods/fedit.py", "def f():\n    from coterie.data import tasks"),
    ("methods/fedit.py", "if TYPE_CHECKING:\n    from coterie.nn import bank"),
    ("methods/fedit.py", "bank = importlib.import_module('coterie.nn.bank')"),
    ("methods/fedit.py", "import transformers"),
    ("methods/parts.py", "from peft import LoraConfig"),
    ("methods/fedit.py", "import flwr.app"),
    ("adapters/pool.py", "from coterie.methods.base import Plan"),
    ("nn/bank.py", "from coterie.methods.base import Plan"),
    ("nn/bank.py", "from coterie.data.rows import Row"),
    ("nn/bank.py", "from coterie.compute.train import train"),
    ("data/rows.py", "from coterie.nn.base import load_base"),
    ("data/tasks.py", "from transformers import AutoTokenizer"),
    ("nn/base.py", "from transformers import AutoTokenizer"),
    ("nn/targets.py", "from peft import LoraConfig"),
    ("adapters/write.py", "from peft import LoraConfig"),
    ("compute/train.py", "from coterie.engines.base import Engine"),
    ("flower/app.py", "from coterie.engines.local import LocalEngine"),
    ("engines/local.py", "from coterie.runs.rounds import Runner"),
    ("engines/local.py", "from coterie import cli"),
    ("engines/local.py", "import flwr"),
    ("runs/rounds.py", "from coterie.nn.attach import attach"),
    ("runs/rounds.py", "import coterie.compute"),
    ("report/page.py", "from coterie.experiment import run"),
    ("experiment.py", "from coterie.deploy.server import serve"),
    ("experiment.py", "from coterie.comparison import compare"),
    ("deploy/status.py", "from coterie.cli.console import show"),
    ("deploy/status.py", "import typer"),
    ("machine.py", "from coterie.types import Json\nfrom coterie.codec import encode"),
]
GOOD = [
    ("methods/fedit.py", "from coterie.methods.parts import start_lora"),
    ("methods/fedit.py", "from .parts import start_lora"),
    ("methods/fedit.py", "from coterie import __version__"),
    ("methods/fedit.py", "import coterie_extras.nn\nimport torch.nn"),
    ("nn/pretrained.py", "from transformers import AutoTokenizer"),
    ("flower/app.py", "from flwr.app import Message"),
    ("compute/train.py", "from coterie.machine import native_bfloat16"),
    ("cli/main.py", "from coterie import nn, engines"),
]


def planted(root: Path, file: str, source: str) -> list[str]:
    for unit in set().union(*LAYERS):
        path = root / unit
        if (ROOT / unit).is_dir():
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
