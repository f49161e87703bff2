"""Finds methods by name, in this package and through the entry points ``coterie.methods``, and checks them.

Only the requested method is imported. A module or folder of this package is a method if it defines ``METHOD``;
an installed package names the method's class (:mod:`coterie.plugins`).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

from coterie import methods as package
from coterie.methods.base import Method
from coterie.methods.plan import MethodSettings
from coterie.plugins import check_new, installed, load
from coterie.types import CoterieError

GROUP = "coterie.methods"
_FLAGS = ("mixed_ranks", "needs_all_rows")
_TEXTS = ("name", "title", "paper", "summary", "newcomers")


@cache
def method_named(name: str) -> type[Method]:
    """The method called ``name``.

    Raises :class:`CoterieError` that lists the known methods if there is none, and that says what is missing if it is
    not a complete method.
    """
    check_new(GROUP, _modules())
    kind = load(installed(GROUP)[name]) if name in installed(GROUP) else _own(name)
    if kind is None:
        raise CoterieError(f"unknown method {name!r}; the methods are {', '.join(methods())}")
    if faults := list(faults_of(kind, name)):
        raise CoterieError(f"method {name!r} {'; it '.join(faults)}")
    checked: type[Method] = kind
    return checked


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by name. Imports all of them."""
    own = [name for name in _modules() if _own(name) is not None]
    return {name: method_named(name) for name in sorted({*own, *installed(GROUP)})}


def faults_of(kind: Any, name: str) -> Iterator[str]:
    """Why ``kind`` cannot be the method called ``name``: missing attributes or functions, or other signatures."""
    if not isinstance(kind, type):
        yield f"is {kind!r}, which is not a class"
        return
    if missing := [*_missing_attributes(kind), *_missing_functions(kind)]:
        known = issubclass(kind, Method)
        yield f"lacks {', '.join(missing)}" + ("" if known else " (coterie.Method, as its base class, has defaults)")
    if (own := getattr(kind, "name", None)) != name and isinstance(own, str):
        yield f"has the name {own!r}, which must be that of its file or entry point"
    for function, wanted in _functions().items():
        own_function = getattr(kind, function, None)
        if inspect.isfunction(own_function) and (actual := _parameters(own_function)) != wanted:
            yield f"has {function}({', '.join(actual)}), which must be {function}({', '.join(wanted)})"
    if (actual := list(inspect.signature(kind).parameters)) != ["settings", "plan"]:
        yield f"is made from ({', '.join(actual)}), which must be (settings, plan)"


def _missing_attributes(kind: type) -> Iterator[str]:
    yield from (text for text in _TEXTS if not isinstance(getattr(kind, text, None), str))
    if getattr(kind, "evaluates", None) not in ("received", "trained"):
        yield 'evaluates ("received" or "trained")'
    yield from (f"{name} (true or false)" for name in _FLAGS if not isinstance(getattr(kind, name, None), bool))
    settings = getattr(kind, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, MethodSettings)):
        yield "Settings (a subclass of MethodSettings)"
    parameters = getattr(getattr(kind, "State", None), "__dataclass_params__", None)  # only dataclasses have it
    if not getattr(parameters, "frozen", False):
        yield "State (a frozen dataclass)"


def _missing_functions(kind: type) -> Iterator[str]:
    for function, parameters in _functions().items():
        own = getattr(kind, function, None)
        if not inspect.isfunction(own) or getattr(own, "__isabstractmethod__", False):
            yield f"{function}({', '.join(parameters)})"


@cache
def _functions() -> dict[str, list[str]]:
    """Every public function of a method, with the names of its parameters."""
    return {n: _parameters(f) for n, f in inspect.getmembers(Method, inspect.isfunction) if not n.startswith("_")}


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]  # without self


def _own(name: str) -> Any:
    """``METHOD`` of the module called ``name`` in this package; None if there is no such module or attribute."""
    if name not in _modules():
        return None
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), "METHOD", None)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
