"""One self-contained HTML page of tables and figures, which fetches nothing; for evaluation_report.py and others.

Sections fold, and wide tables scroll sideways on a small screen.
"""

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.6rem; } summary { font-size: 1.2rem; font-weight: 600; cursor: pointer; padding: .4rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #999; }
tr.mean td { font-weight: 600; background: #f6f6f6; } p { max-width: 75ch; color: #444; }
td:last-child, th:last-child { white-space: normal; overflow-wrap: anywhere; } img { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; } body { color: #ddd; background: #181818; } p { color: #bbb; }
  th, td { border-color: #444; } tr.mean td { background: #262626; }
}
"""


@dataclass(frozen=True)
class Section:
    """A heading with an explanation, a table and figures; empty ones are left out."""

    title: str
    about: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    means: Sequence[Sequence[str]] = ()
    """Rows below the others, in bold."""
    figures: Sequence[Path] = ()
    """PNG files, embedded into the page."""
    inner: str = ""
    """HTML that is put into the page as it is."""


def html_page(title: str, about: str, sections: Sequence[Section], style: str = "", script: str = "") -> str:
    """The HTML text of a page with these sections.

    Args:
        title: of the page.
        about: a paragraph below it; "": none.
        sections: in their order.
        style: further CSS.
        script: JavaScript that runs at the end. A browser runs nothing else in the page, and fetches nothing for it.
    """
    body = "".join(map(_section, sections))
    name = html.escape(title)
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}{style}</style>'
    opening = f"<h1>{name}</h1>" + (f"<p>{html.escape(about)}</p>" if about else "")
    body += f"<script>{script}</script>" if script else ""
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{opening}{body}</body></html>\n'


def _section(section: Section) -> str:
    parts = [f"<p>{html.escape(section.about)}</p>"] if section.about else []
    parts.append(section.inner)
    if section.rows:
        parts.append(f'<div class="wide"><table><tr>{_cells("th", section.columns)}</tr>')
        parts += [f"<tr>{_cells('td', row)}</tr>\n" for row in section.rows]
        parts += [f"<tr class=mean>{_cells('td', row)}</tr>\n" for row in section.means]
        parts.append("</table></div>")
    for figure in section.figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">\n')
    return f"<details open><summary>{html.escape(section.title)}</summary>{''.join(parts)}</details>\n"


def _cells(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
