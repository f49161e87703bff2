"""How long a file and a function may be. What is longer does two things: find both, and give each a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import coterie

ROOT = Path(coterie.__file__).parent
FILE, FUNCTION = 350, 40  # lines


def too_long(name: str, source: str) -> Iterator[str]:
    """The file, where it is too long, and every function in it that is."""
    if len(source.splitlines()) > FILE:
        yield name
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > FUNCTION:  # from its def to its last line, without decorators
                yield f"{name}: {node.name}"


def test_no_file_and_no_function_is_too_long() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 100
    found = {
        fault
        for path in files
        for fault in too_long(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_what_is_too_long_is_found() -> None:
    body = "    pass\n"
    assert list(too_long("a.py", "def f():\n" + body * (FUNCTION - 1))) == []
    assert list(too_long("a.py", "class A:\n    async def f(self):\n" + f"    {body}" * FUNCTION)) == ["a.py: f"]
    assert list(too_long("a.py", "x = 1\n" * FILE)) == []
    assert list(too_long("a.py", "x = 1\n" * (FILE + 1))) == ["a.py"]
