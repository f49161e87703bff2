"""The page in a real browser: what it shows of an answer, by keyboard, on a phone, and what it may fetch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest

from api_runs import LABELS
from browser import CHROMIUM, Tab, tab
from coterie.api.page import PAGE, policy_of
from coterie.api.server import Ready

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
TAB, ENTER, CONTROL = ("Tab", 9), ("Enter", 13), 2


def query(service: Ready, **values: str) -> str:
    return f"{service.address}?{urlencode(values)}"


def text(id_: str) -> str:
    return f"document.getElementById('{id_}').textContent"


def send(page: Tab, prompt: str) -> None:
    """Send the text that the address gave, as a person would."""
    page.until(f"document.getElementById('text').value === {json.dumps(prompt)}")
    page.press(*ENTER, modifiers=CONTROL)


def is_shown(id_: str) -> str:
    return f"document.getElementById('{id_}').offsetParent !== null"


@browser
@pytest.mark.slow
def test_a_classifier_shows_its_label_probabilities_and_experts(classifier: Ready, tmp_path: Path) -> None:
    with tab(query(classifier, client="south", text="<b>the printer</b> & smokes"), tmp_path) as page:
        send(page, "<b>the printer</b> & smokes")
        page.until(is_shown("experts"))
        assert page.run(text("label")) in LABELS["south"]
        for label in LABELS["south"]:
            assert label in page.run(text("labels"))
        assert page.run(text("labels")).count("%") == len(LABELS["south"])
        assert page.run(text("legend")) == "expert 0expert 1expert 2expert 3"
        assert page.run("document.querySelectorAll('.experts thead th').length") == 3
        assert page.run("document.querySelectorAll('.experts .mix').length") > 20  # one for each token and layer
        assert (
            page.run("document.querySelector('.mix span').getBoundingClientRect().height") > 0
        )  # the policy allows it
        assert not page.run(is_shown("alert"))
        assert page.run("document.querySelectorAll('b').length") == 0  # text stays text


@browser
@pytest.mark.slow
def test_a_generator_is_used_by_keyboard_alone(generator: Ready, tmp_path: Path) -> None:
    with tab(generator.address, tmp_path) as page:
        page.until("document.getElementById('client').options.length === 3")
        assert not page.run(is_shown("result"))
        for name in ("client", "most", "temperature", "text"):
            page.press(*TAB)
            assert page.run("document.activeElement.id") == name
        page.type("one two")
        page.press(*ENTER, modifiers=CONTROL)
        page.until(is_shown("experts"))
        assert re.search(r"\d+ tokens read, \d+ written", page.run(text("about")))
        assert page.run("document.getElementById('written').textContent.length") > 0
        assert page.run("document.querySelectorAll('.experts tbody tr').length") > 5
        assert page.run("document.getElementById('result').getAttribute('aria-busy')") == "false"
        page.run("document.getElementById('text').value = 'word '.repeat(400)")
        page.press(*ENTER, modifiers=CONTROL)
        page.until(is_shown("alert"))
        assert "the model takes 160" in page.run(text("alert"))


@browser
@pytest.mark.slow
def test_it_fits_a_phone_and_has_dark_colours(classifier: Ready, tmp_path: Path) -> None:
    with tab(query(classifier, client="north", text="a long text " * 9), tmp_path) as page:
        send(page, "a long text " * 9)
        colours = set()
        for width in (1200, 390):
            for scheme in ("light", "dark"):
                page.show(width, 800, scheme)
                page.until(is_shown("experts"))
                assert page.run("document.documentElement.scrollWidth") <= width
                colours.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2


@browser
@pytest.mark.slow
def test_a_link_runs_nothing_and_a_token_without_a_name_is_shown(classifier: Ready, tmp_path: Path) -> None:
    with tab(query(classifier, client="south", text="the printer"), tmp_path) as page:
        page.until("document.activeElement.id === 'text'")
        assert page.run("document.getElementById('text').value") == "the printer"
        assert page.run("document.getElementById('client').value") == "south"
        assert page.run("running") is None
        assert (
            page.run("performance.getEntriesByType('resource').filter((each) => each.name.includes('classify')).length")
            == 0
        )
        assert not page.run(is_shown("result"))
        assert [page.run(f"shown({token})") for token in ("null", "undefined", "''", "'\u2581a'")] == [
            "·",
            "·",
            "·",
            "·a",
        ]


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
