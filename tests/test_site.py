"""The documentation builds as a site without a warning, has every guide, and fetches nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import GUIDES, ROOT

pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

FETCHED = re.compile(r"<(?:script|img|source|iframe|link)\b[^>]*?\s(?:src|href)=\"?([^\s\">]+)")
ROOT_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


def external(html: str) -> list[str]:
    """What a page makes a browser fetch from another server."""
    return [link for link in FETCHED.findall(html) if re.match(r"(\w+:)?//", link)]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert {link for page in site.rglob("*.html") for link in external(page.read_text())} == set()
    assert not [style for style in site.rglob("*.css") if re.search(r"url\(\W?(https?:)?//", style.read_text())]
    page = '<link href=a.css><img alt="" src="//b/c.png"><script async src=https://d/e.js></script><a href="https://f">'
    assert external(page) == ["//b/c.png", "https://d/e.js"]


def test_every_guide_is_a_page_with_its_figures(site: Path) -> None:
    for guide in GUIDES:
        name = ROOT_PAGES.get(guide.stem) if guide.parent == ROOT else guide.relative_to(ROOT / "docs").with_suffix("")
        page = site / ("index.html" if name == "index" else f"{str(name).removesuffix('README')}/index.html")
        html = page.read_text()
        title = re.search(r"^# (.+)$", guide.read_text(), re.MULTILINE)[1]
        assert title.split("`")[0] in re.sub(r"&amp;", "&", html), guide
        assert html.count('<svg class="figure"') == guide.read_text().count(".svg)")


def test_python_names_have_their_docstrings(site: Path) -> None:
    html = (site / "api" / "index.html").read_text()
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in html or f'id="{name}.' in html, name
    assert "Build the model that a folder holds and load its weights." in html
