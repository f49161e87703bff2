"""Run folders made by hand, the pages that are made of them as a browser sees them, and pictures as pixels."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg


def make_run(folder: Path, lines: list[dict], total: dict | None = None, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    if lines:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, content in {**files, **({"summary": total} if total else {})}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """What a browser would make of the page: its text, ids and tags; unbalanced tags are an error."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._seen(tag, dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._seen(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    def _seen(self, tag, attrs):
        self.tags[tag] += 1
        self.ids.update([attrs["id"]] if "id" in attrs else [])
        self.loads += [
            value for name, value in attrs.items() if name in ("src", "href", "xlink:href", "data", "srcset")
        ]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def drawn(figure) -> np.ndarray:
    """The pixels of a figure, drawn without a single warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())
