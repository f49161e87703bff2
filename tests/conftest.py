"""What tests do without, for it takes half of their time: waiting for the disk, and drawing the pictures of reports."""

from __future__ import annotations

import os

import pytest

DRAWN = ("report", "comparison")  # the folders whose tests look at pictures


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written as ever, and may be lost if the machine itself stops, which no test does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty picture of the same name in every report. ``@pytest.mark.pictures`` draws them."""
    if request.path.parent.name in DRAWN or request.node.get_closest_marker("pictures"):
        return
    monkeypatch.setattr("coterie.report.plots.svg", lambda figure, name: f'<svg role="img" aria-label="{name}"></svg>')
