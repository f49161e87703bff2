"""The page in a real browser: what it shows of an answer, and that it fetches nothing from elsewhere."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlencode

import pytest

from api_runs import LABELS
from coterie.api.page import PAGE, policy_of
from coterie.api.server import Ready

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def shown(service: Ready, folder: Path, **query: str) -> str:
    """The page after its script ran, for a query that it sends by itself."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={folder}", "--virtual-time-budget=8000"),
        *("--dump-dom", f"{service.address}?{urlencode(query)}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def part(page: str, id_: str) -> str:
    """The text of the element with that id."""
    element = re.search(rf'<(\w+)[^>]*\bid="{id_}"[^>]*>(.*?)</\1>', page, re.DOTALL)
    assert element is not None
    return html.unescape(re.sub(r"<[^>]*>", " ", element[2]))


def is_hidden(page: str, id_: str) -> bool:
    tag = re.search(rf'<\w+[^>]*\bid="{id_}"[^>]*>', page)
    assert tag is not None
    return 'hidden=""' in tag[0]


@browser
@pytest.mark.slow
def test_a_classifier_shows_its_label_probabilities_and_experts(classifier: Ready, tmp_path: Path) -> None:
    text = "<b>the printer</b> & smokes"
    page = shown(classifier, tmp_path, client="south", text=text)
    assert part(page, "label").strip() in LABELS["south"]
    assert set(part(page, "labels").split()) >= set(LABELS["south"])
    assert part(page, "labels").count("%") == len(LABELS["south"])
    assert part(page, "legend").split() == ["expert", "0", "expert", "1", "expert", "2", "expert", "3"]
    experts = part(page, "experts")
    assert "layer 0" in experts
    assert "layer 1" in experts
    assert experts.count("%") > 20  # one expert per token and layer
    assert is_hidden(page, "alert")
    assert "<b>the printer" not in page  # text stays text


def test_the_page_names_nothing_of_another_origin_and_labels_every_field() -> None:
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:,)[^"'#\s)]+""", PAGE) == []
    assert "http" not in PAGE
    assert "innerHTML" not in PAGE
    fields = set(re.findall(r'<(?:select|input|textarea)[^>]*\bid="([\w-]+)"', PAGE))
    assert fields == set(re.findall(r'<label for="([\w-]+)"', PAGE))
    assert len(fields) == 5
    assert policy_of(PAGE).count("'sha256-") == 2
    assert " style=" not in PAGE  # which the policy would refuse
    assert not re.search(r"\son\w+=", PAGE)
