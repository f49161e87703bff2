"""Build the documentation as a website in build/site, with Zensical: `make site`.

The pages are those that one reads in the repository. They are copied with the files that they link to, a link to a
folder becomes one to its README.md, and a link that leads nowhere stops the build. Nothing on the site is fetched from
elsewhere.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "site-pages"
SITE = ROOT / "build" / "site"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]*)(#[^)\s]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

NAVIGATION: dict[str, str | list[str]] = {
    "Home": "README.md",
    "Learn": ["docs/tutorial-paper.md", "docs/tutorial-federation.md"],
    "Use": [
        "docs/data.md",
        "docs/llm.md",
        "docs/run-folder.md",
        "docs/using-a-run.md",
        "docs/serving.md",
        "docs/gallery.md",
        "docs/formats.md",
        "docs/comparing.md",
        "docs/simulation.md",
        "docs/deploy.md",
        "docs/messages.md",
        "docs/robustness.md",
        "docs/secure-aggregation.md",
        "docs/privacy.md",
        "SECURITY.md",
        "examples/README.md",
    ],
    "Methods": [
        "docs/methods/fedlease.md",
        "docs/methods/fedamole.md",
        "docs/methods/smartfed.md",
        "docs/methods/baselines.md",
        *(
            f"docs/methods/{name}.md"
            for name in (
                *("fedit", "fedprox", "ffa_lora", "fedsa_lora", "rolora", "flexlora", "hetlora", "flora", "fedex_lora"),
                *("ifca", "fdlora", "feddpa", "fedalt", "local", "centralised"),
            )
        ),
    ],
    "Measured": [
        "docs/results/README.md",
        "docs/results/study.md",
        "docs/results/fedlease.md",
        "docs/results/fedamole.md",
        "docs/results/smartfed.md",
        "docs/results/privacy.md",
        "docs/results/robustness.md",
        "docs/performance.md",
        "docs/performance-batched.md",
        "docs/peers.md",
        "bench/README.md",
    ],
    "Reference": [
        "docs/reference/config.md",
        "docs/reference/site.md",
        "docs/reference/methods.md",
        "docs/reference/releases.md",
        "CHANGELOG.md",
    ],
    "Work on it": [
        "docs/architecture.md",
        "docs/decisions/README.md",
        "CONTRIBUTING.md",
        "examples/plugin/README.md",
    ],
}


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown pages of the repository, relative to ``root``."""
    found = [*root.glob("*.md")]
    for folder in ("docs", "examples", "bench"):
        found += (page for page in (root / folder).rglob("*.md") if "data" not in page.relative_to(root).parts)
    return sorted(page.relative_to(root) for page in found)


def copy(root: Path, to: Path) -> list[str]:
    """Copy the pages of ``root`` and the files that they link to below ``to``; return the links that lead nowhere."""
    anchors = {page: set(_anchors((root / page).read_text(encoding="utf-8"))) for page in pages(root)}
    dead = []
    for page in anchors:
        text = (root / page).read_text(encoding="utf-8")
        for target, anchor in _links(text):
            path = _target(root, page, target)
            if not path.exists() or not path.is_relative_to(root):
                dead.append(f"{page}: {target}")
            elif (known := anchors.get(path.relative_to(root))) is not None and anchor and anchor not in known:
                dead.append(f"{page}: {target}#{anchor}")
            elif path.is_file() and path.suffix != ".md":
                (to / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to / path.relative_to(root))
        (to / page).parent.mkdir(parents=True, exist_ok=True)
        (to / page).write_text(LINK.sub(partial(_rewritten, root, page), text), encoding="utf-8")
    return dead


def config(root: Path = ROOT) -> str:
    """Zensical's config: the navigation, whose titles are those of the pages."""
    lines = [
        "[project]",
        'site_name = "Coterie"',
        'site_description = "Fine-tune language models across organisations with mixtures of LoRA experts"',
        'docs_dir = "site-pages"',  # relative to the config's folder
        'site_dir = "site"',
        "use_directory_urls = false",
        "nav = [",
        *(f"  {_entry(root, title, pages)}," for title, pages in NAVIGATION.items()),
        "]",
        "[project.theme]",
        "font = false",  # fonts would come from another server
        'features = ["navigation.tabs", "navigation.top", "search.highlight", "content.code.copy"]',
        *(f'[[project.theme.palette]]\nmedia = "(prefers-color-scheme: {scheme})"\nscheme = "{name}"'
          for scheme, name in (("light", "default"), ("dark", "slate"))),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Copy, check, build."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    if dead := copy(ROOT, PAGES):
        sys.exit("links that lead nowhere:\n" + "\n".join(dead))
    path = ROOT / "build" / "zensical.toml"
    path.write_text(config(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(path)], check=True)
    print(f"open {SITE / 'index.html'}")


def _entry(root: Path, title: str, pages: str | list[str]) -> str:
    if isinstance(pages, str):
        return f'{{ "{title}" = "{pages}" }}'
    inner = ", ".join(f'{{ "{_title(root, page)}" = "{page}" }}' for page in pages if (root / page).is_file())
    return f'{{ "{title}" = [{inner}] }}'


def _title(root: Path, page: str) -> str:
    found = HEADING.search((root / page).read_text(encoding="utf-8"))
    return found[1].replace("`", "").replace('"', "'") if found else page


def _links(text: str) -> Iterator[tuple[str, str]]:
    """Target and anchor of each relative link outside of code."""
    for match in LINK.finditer(FENCED.sub("", text)):
        if not match[2].startswith(("http:", "https:", "mailto:")):
            yield match[2], (match[3] or "")[1:]


def _anchors(text: str) -> Iterator[str]:
    """What the headings are called in links: lower case, without punctuation, with hyphens for spaces."""
    for heading in HEADING.findall(FENCED.sub("", text)):
        yield (
            re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).strip().replace(" ", "-")
        )


def _target(root: Path, page: Path, target: str) -> Path:
    """The file that a link of ``page`` leads to: of a folder, its README.md if there is one."""
    path = (root / page.parent / target).resolve() if target else root / page
    return path / "README.md" if (path / "README.md").is_file() else path


def _rewritten(root: Path, page: Path, match: re.Match[str]) -> str:
    path = (root / page.parent / match[2]).resolve()
    more = "/README.md" if match[2] and path.is_dir() and (path / "README.md").is_file() else ""
    return f"{match[1]}{match[2].rstrip('/') if more else match[2]}{more}{match[3] or ''})"


if __name__ == "__main__":
    main()
