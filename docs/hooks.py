"""What MkDocs does beside its configuration: pages from the root of the repository, links out of docs/, figures.

README.md, CONTRIBUTING.md and CHANGELOG.md stand where a visitor of the repository looks for them, with links that work
there. The site has them as pages too. Links to files that the site does not have are shown as their text alone.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FIGURE = re.compile(r'<img alt="([^"]*)" src="(?:[./]*)figures/([\w-]+)\.svg"\s*/?>')


def on_config(config: Any) -> None:
    """Give headings the anchors that the repository's own viewer gives them."""
    config.mdx_configs["toc"]["slugify"] = lambda text, _: re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from the root of the repository."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links of the repository links of the site."""
    sources = {page: source for source, page in ROOT_PAGES.items()}
    name = page.file.src_uri
    place = sources.get(name, f"docs/{name}")  # in the repository
    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)  # code has no links

    def site_link(match: re.Match[str]) -> str:
        image, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        if not link or "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        target = ROOT_PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not target:
            return text
        return f"{image}[{text}]({posixpath.relpath(target, posixpath.dirname(name) or '.')}{anchor})"

    return "".join(part if number % 2 else LINK.sub(site_link, part) for number, part in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Put figures into the page itself, so that their colours follow its scheme."""

    def figure(match: re.Match[str]) -> str:
        svg = (ROOT / "docs" / "figures" / f"{match[2]}.svg").read_text(encoding="utf-8")
        return f'<div class="figure-frame">{svg}</div>'

    return FIGURE.sub(figure, html)
