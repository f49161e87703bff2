"""The documentation as a website: every page is in its navigation, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
APART = ("docs/decisions/", "bench/results/")  # reached by links


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_leads_somewhere_and_linked_files_come_along(site: ModuleType, tmp_path: Path) -> None:
    assert site.copy(ROOT, tmp_path) == []
    assert (tmp_path / "docs" / "pictures" / "demo.png").is_file()
    assert "(docs/decisions/README.md)" in (tmp_path / "README.md").read_text()


def test_every_page_is_in_the_navigation_once(site: ModuleType) -> None:
    listed = [page for pages in site.NAVIGATION.values() for page in ([pages] if isinstance(pages, str) else pages)]
    here = {page.as_posix() for page in site.pages(ROOT)}
    inner = {page for page in here if page.startswith(("docs/", "bench/")) and not page.startswith(APART)}
    assert len(set(listed)) == len(listed)
    assert set(listed) - here == set()
    assert inner - set(listed) == {"docs/README.md"}  # the list of pages, which the navigation replaces


def test_the_config_is_valid_and_titles_are_those_of_the_pages(site: ModuleType) -> None:
    project = tomllib.loads(site.config(ROOT))["project"]
    methods = next(entry["Methods"] for entry in project["nav"] if "Methods" in entry)
    assert methods[0] == {"FedLEASE": "docs/methods/fedlease.md"}


@pytest.mark.parametrize(
    "link", ["[a](none.md)", "[a](../beside.md)", "[a](b.md#none)", "![a](none.png)", "[a](#none)"]
)
def test_a_link_that_leads_nowhere_is_found(site: ModuleType, tmp_path: Path, link: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "beside.md").touch()
    (root / "b.md").write_text("# Be it so\n\n[c](b.md#be-it-so) [d](#be-it-so)\n\n```\n[e](none.md)\n```\n")
    assert site.copy(root, tmp_path / "one") == []
    (root / "a.md").write_text(f"# A\n\n{link}\n")
    assert len(site.copy(root, tmp_path / "two")) == 1
