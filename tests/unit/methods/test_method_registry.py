"""The registry: methods by name, in the package and from installed packages, each checked when it is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import coterie.methods
import packages
from coterie.methods.base import Method
from coterie.methods.fedit import FedIT
from coterie.methods.local import Local
from coterie.methods.registry import method_named, methods
from coterie.types import CoterieError

COPY = "from coterie.methods.fedit import FedIT\n\n\nclass Copy(FedIT):\n    name = {name!r}\n\n\nMETHOD = Copy\n"
OURS = {"fedamole", "fedit", "fedlease", "local", "smartfed"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    packages.forget()
    yield tmp_path
    packages.forget()


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Make the package of methods look into ``folder`` too, with a file for each source."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"coterie.methods.{name}", raising=False)
    monkeypatch.setattr(coterie.methods, "__path__", [*coterie.methods.__path__, str(folder)])


def test_every_file_and_folder_of_the_package_that_is_a_method_is_found() -> None:
    package = Path(coterie.methods.__file__).parent
    files = [*package.glob("[a-z]*.py"), *package.glob("[a-z]*/__init__.py")]
    defining = [path for path in files if "\nMETHOD = " in path.read_text(encoding="utf-8")]
    assert set(methods()) >= OURS
    assert set(methods()) == {path.parent.name if path.stem == "__init__" else path.stem for path in defining}
    assert not {"base", "findings", "parts", "plan", "registry"} & set(methods())
    assert list(methods()) == sorted(methods())
    for name, kind in methods().items():
        assert kind.name == name
        assert kind is method_named(name)
        assert issubclass(kind, Method)
        assert kind.__doc__


def test_only_the_method_that_is_named_is_imported() -> None:
    code = (
        "import sys; from coterie.methods.registry import method_named; method_named('local'); "
        "print(sorted(n for n in sys.modules if n.startswith('coterie.methods.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "coterie.methods.local" in done.stdout
    assert not [name for name in OURS - {"local"} if f"coterie.methods.{name}" in done.stdout]


def test_a_new_file_is_a_new_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(folder, monkeypatch, planted=COPY.format(name="planted"), helpers="X = 1\n", _secret="raise AssertionError\n")
    assert set(methods()) - OURS >= {"planted"}
    assert not {"helpers", "_secret"} & set(methods())
    assert issubclass(method_named("planted"), FedIT)
    with pytest.raises(CoterieError, match="unknown method 'helpers'"):
        method_named("helpers")


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(CoterieError, match=r"unknown method 'fedlaese'; the methods are .*fedit, fedlease, .*local"):
        method_named("fedlaese")


INCOMPLETE = {
    "lacks expects(state, me, rnd)": "    expects = None",
    "lacks name, title": "    name = title = None",
    'lacks evaluates ("received" or "trained")': '    evaluates = "sent"',
    "lacks mixed_ranks (true or false)": "    mixed_ranks = None",
    "lacks needs_all_rows (true or false)": "    needs_all_rows = 1",
    "lacks Settings (a subclass of MethodSettings)": "    Settings = dict",
    "lacks State (a frozen dataclass)": "    State = dict",
    "has the name 'fedit', which must be that of its file or entry point": "    name = 'fedit'",
    "has aggregate(state, replies), which must be aggregate(state, replies, rnd)": (
        "    def aggregate(self, state, replies):\n        return state"
    ),
    "is made from (settings), which must be (settings, plan)": "    def __init__(self, settings): ...",
}


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_an_incomplete_method_says_what_is_missing(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = COPY.format(name="planted").replace("    name = 'planted'", f"    name = 'planted'\n{INCOMPLETE[fault]}")
    plant(folder, monkeypatch, planted=source)
    with pytest.raises(CoterieError) as raised:
        method_named("planted")
    assert str(raised.value) == f"method 'planted' {fault}"


def test_a_method_without_the_base_class_is_pointed_to_its_defaults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(
        folder, monkeypatch, planted="class METHOD:\n    name = 'planted'\n    def __init__(self, settings, plan): ..."
    )
    with pytest.raises(CoterieError, match=r"lacks title, .*begin\(base, me\).*coterie\.Method, as its base class"):
        method_named("planted")
    plant(folder, monkeypatch, other="METHOD = 3\n")
    with pytest.raises(CoterieError, match="method 'other' is 3, which is not a class"):
        method_named("other")


def test_an_abstract_function_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import coterie.methods.base as base\nclass METHOD(base.Method):\n    name = 'planted'\n"
    plant(folder, monkeypatch, planted=source)
    with pytest.raises(CoterieError) as raised:
        method_named("planted")
    assert "client(ins, me, personal)" in str(raised.value)
    assert "begin(" not in str(raised.value), "it has a default"


def test_the_defaults_are_those_of_most_methods() -> None:
    assert (FedIT.evaluates, FedIT.newcomers) == ("received", "")
    assert Local.experts is Method.experts
    assert Local.describe is Method.describe


# from installed packages ----------------------------------------------------------------------------------------------


def test_an_installed_package_adds_a_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"coterie.methods: fedcopy": "copies:Copy"}
    packages.install(folder, monkeypatch, "coterie-copies", points, copies=COPY.format(name="fedcopy"))
    assert method_named("fedcopy").name == "fedcopy"
    assert set(methods()) >= {*OURS, "fedcopy"}


def test_what_no_config_names_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"coterie.methods: bomb": "bomb:Bomb"}
    packages.install(folder, monkeypatch, "coterie-bomb", points, bomb="raise AssertionError('imported')\n")
    assert method_named("fedit") is FedIT
    with pytest.raises(AssertionError, match="imported"):
        methods()


FAULTY = {
    "another name": ("copies:Copy", COPY.format(name="other"), "method 'fedcopy' has the name 'other'"),
    "no such class": ("copies:Cpoy", COPY.format(name="fedcopy"), "coterie-copies adds 'fedcopy'.*Cpoy cannot be imp"),
    "no such module": ("elsewhere:Copy", "", "coterie-copies adds 'fedcopy'.*cannot be imported: No module"),
    "incomplete": ("copies:Copy", "class Copy: ...\n", "method 'fedcopy' lacks name, title"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_package_is_named(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, source, reason = FAULTY[case]
    packages.install(folder, monkeypatch, "coterie-copies", {"coterie.methods: fedcopy": value}, copies=source)
    with pytest.raises(CoterieError, match=reason):
        method_named("fedcopy")
    assert method_named("fedit") is FedIT


def test_a_package_may_not_take_a_name_that_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"coterie.methods: fedit": "copies:Copy"}
    packages.install(folder, monkeypatch, "coterie-copies", points, copies=COPY.format(name="fedit"))
    with pytest.raises(CoterieError, match=r"coterie-copies adds 'fedit' .* already"):
        method_named("fedit")


def test_two_packages_with_one_name_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("one", "two"):
        points = {"coterie.methods: fedcopy": f"{number}:Copy"}
        source = COPY.format(name="fedcopy")
        packages.install(folder / number, monkeypatch, f"coterie-{number}", points, **{number: source})
    with pytest.raises(CoterieError, match=r"two packages add 'fedcopy' to coterie\.methods: coterie-(one|two) and"):
        method_named("fedcopy")
