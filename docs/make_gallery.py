"""Make the pictures of docs/gallery.md in docs/pictures: `make gallery`.

Runs `coterie demo` unless that is done, and draws the pictures of FedLEASE's report. Where Chromium is installed, also
takes pictures of the report and of the service's page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode

from PIL import Image

from coterie.api.server import Service, ready
from coterie.artifacts.cross import cross_table
from coterie.cli.console import out
from coterie.cli.demo import run_demo
from coterie.report.page import write_report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import browser  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
WIDTH, HEIGHT, COLOURS = 900, 1600, 64  # of a picture, at most
TEXT = "the boiler in the school on mill road has failed and the rooms are cold"
SHOWN = ("client-distances", "dendrogram", "silhouettes", "metric-by-round", "experts-by-layer")  # as the report says


def draw(run: Path) -> None:
    """The pictures of the run's report, and of every model on everyone's test rows."""
    write_report(run, pictures=True)
    for name in SHOWN:
        small(run / "pictures" / f"{name}.png", f"fedlease-{name}")
    small(cross_table(run, "").picture, "cross")


def screenshots(run: Path) -> None:
    """The report, and the service's page with an answer: on a desk, and on a phone in the dark."""
    look((run / "report.html").resolve().as_uri(), "report", 1000, 1100, "light", "true")
    with ready(Service(run, port=0)) as service:
        thread = Thread(target=service.run, daemon=True)
        thread.start()
        address = f"{service.address}?{urlencode({'client': 'city-0', 'text': TEXT})}"
        answered = "document.getElementById('experts').offsetParent !== null"
        look(address, "page", 1000, 900, "light", answered)
        look(address, "page-phone", 420, 900, "dark", answered)
        service.server.should_exit = True
        thread.join()


def look(address: str, name: str, width: int, height: int, scheme: str, until: str) -> None:
    """A picture of the page at ``address`` once ``until`` holds; a text that the address gave is sent."""
    with tempfile.TemporaryDirectory() as profile, browser.tab(address, Path(profile)) as page:
        page.show(width, height, scheme)
        page.until("document.readyState === 'complete'")
        if "?" in address:
            page.until("document.getElementById('text').value !== ''")
            page.press("Enter", 13, modifiers=2)
        page.until(until)
        path = Path(profile) / f"{name}.png"
        page.picture(path)
        small(path, name)


def small(path: Path, name: str) -> None:
    """Write the picture at ``path`` as ``name`` in docs/pictures: at most WIDTH by HEIGHT, with few colours."""
    with Image.open(path) as image:
        plain = image.convert("RGB")
        if plain.width > WIDTH:
            plain = plain.resize((WIDTH, round(plain.height * WIDTH / plain.width)), Image.Resampling.LANCZOS)
        plain = plain.crop((0, 0, plain.width, min(plain.height, HEIGHT)))
        plain.quantize(COLOURS).save(PICTURES / f"{name}.png", optimize=True)
    print(f"docs/pictures/{name}.png: {(PICTURES / f'{name}.png').stat().st_size // 1024} KiB")


def main() -> None:
    """Run the demo unless it is there, draw, take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="the folder of the demo")
    demo = parser.parse_args().demo
    if not (demo / "demo.json").is_file():
        run_demo(demo, out)
    draw(demo / "fedlease-0")
    if browser.CHROMIUM is None:
        print("no screenshots: Chromium is not installed")
    else:
        screenshots(demo / "fedlease-0")


if __name__ == "__main__":
    main()
