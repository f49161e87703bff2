"""The public face: what ``import coterie`` gives, and that it costs nothing until it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coterie
from coterie import comparison, experiment
from coterie.artifacts import load as loading
from coterie.methods.base import Method

SOURCE = Path(coterie.__file__)


def test_import_coterie_imports_nothing_heavy() -> None:
    code = "import sys, coterie; print(coterie.__version__, [n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{coterie.__version__} []\n"


def test_every_public_name_is_what_it_says() -> None:
    assert coterie.run is experiment.run
    assert coterie.compare is comparison.compare
    assert coterie.load is loading.load
    assert coterie.Method is Method
    for name in coterie.__all__:
        assert getattr(coterie, name) is not None
        assert name in dir(coterie)
    with pytest.raises(AttributeError, match="has no attribute 'federate'"):
        _ = coterie.federate  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names_in_the_same_modules() -> None:
    (block,) = [node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == coterie._MODULES
    assert {*seen, "__version__"} == {*coterie.__all__}
    assert (SOURCE.parent / "py.typed").is_file()


def test_no_submodule_takes_a_public_name() -> None:
    taken = {path.stem for path in SOURCE.parent.iterdir()} & {*coterie.__all__}
    assert taken == set(), "Python would bind the module to the package under the function's name"
