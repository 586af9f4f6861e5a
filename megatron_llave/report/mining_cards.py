"""The parts of the report of mined negatives that are seen: cards of inputs, and the histogram of similarities.

mining_report.py chooses what is shown.
"""

import base64
import html
from collections.abc import Mapping, Sequence

from megatron_llave.batch import Side
from megatron_llave.data.image_files import BadImageError, shrink
from megatron_llave.data.placeholders import remove_placeholders, unescape

THUMBNAIL, QUALITY = 160, 70
"""Longest side of an image in the page, pixels, and the quality of its WebP."""
MOST_CHARACTERS = 180
"""Characters of a text that are shown."""

STYLE = """
:root { --edge: #ddd; --card: #f6f6f6; --soft: #666; --right: #009E73; --mined: #D55E00; --seen: #8a8a8a; }
h3 { font-size: 1.02rem; margin: 1.2rem 0 .3rem; } summary { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .5rem; }
.mined { border-top: 1px solid var(--edge); padding: .6rem 0 .8rem; } .mined > p { margin: 0 0 .4rem; font-size: 13px; }
.card { margin: 0; background: var(--card); border: 1px solid var(--edge); border-top: 3px solid var(--edge);
  border-radius: 4px; padding: .35rem .45rem; min-width: 0; font-size: 13px; line-height: 1.35; }
.card.right { border-top-color: var(--right); } .card.negative { border-top-color: var(--mined); }
.card figcaption { display: flex; justify-content: space-between; gap: .4rem; color: var(--soft); font-size: 12px; }
.card figcaption b { font-variant-numeric: tabular-nums; }
.card img { display: block; width: 100%; height: 116px; object-fit: contain; background: #fff; margin: .3rem 0;
  border-radius: 2px; }
.card div { overflow-wrap: anywhere; margin-top: .2rem; } .card .soft, .legend { color: var(--soft); }
.query { grid-column: span 2; } .query .seen { display: flex; gap: .6rem; }
.histogram { max-width: 540px; width: 100%; } .histogram text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.histogram path.axis { stroke: var(--edge); stroke-width: 1; } .histogram path { fill-opacity: .14; stroke-width: 2;
  vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; font-size: 13px; }
.legend i { display: inline-block; width: 1rem; height: .7rem; margin-right: .35rem; border-radius: 2px; }
.positives { stroke: var(--right); fill: var(--right); background: var(--right); }
.candidates { stroke: var(--seen); fill: var(--seen); background: var(--seen); }
.negatives { stroke: var(--mined); fill: var(--mined); background: var(--mined); }
td:last-child, th:last-child { overflow-wrap: normal; } .told { margin-bottom: .6rem; }
.told th:last-child, .told td:last-child { text-align: left; }
@media (prefers-color-scheme: dark) {
  :root { --edge: #444; --card: #242424; --soft: #aaa; --right: #2bc79a; --mined: #ff8a3d; --seen: #a5a5a5; }
}
"""
LEGEND = {
    "positives": "least similar positive of each query",
    "candidates": "candidates that were looked at",
    "negatives": "negatives",
}
"""The histograms of the manifest, in the order in which they are drawn."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 440, 200, 40, 34, 8
"""Pixels of the histogram's drawing and of its margins."""


def row_of_cards(note: str, cards: Sequence[str]) -> str:
    """A line of text above cards, which wrap."""
    return f'<div class="mined"><p>{html.escape(note)}</p><div class="cards">{"".join(cards)}</div></div>\n'


def card(kind: str, caption: str, value: str, side: Side, unsaid: str = "") -> str:
    """One input with what it is and a value.

    Args:
        kind: query, right, negative or used; its class in STYLE.
        caption: says what it is.
        value: beside it.
        side: the input. Of several images the first is shown, of a video the frame in its middle.
        unsaid: a text that is not worth repeating.
    """
    parts = [f"<figcaption><span>{html.escape(caption)}</span><b>{html.escape(value)}</b></figcaption>"]
    if side.images:
        parts.append(_image(side.images[len(side.images) // 2 if side.is_video else 0]))
    text = shown_text(side)
    if text and not (side.images and text == unsaid):
        more = len(text) - MOST_CHARACTERS
        cut = text if more <= 0 else f"{text[:MOST_CHARACTERS].rstrip()}... (+{more:,} characters)"
        parts.append(f"<div>{html.escape(cut)}</div>")
    if side.is_video:
        parts.append(f'<div class="soft">video, {len(side.images)} frames</div>')
    elif len(side.images) > 1:
        parts.append(f'<div class="soft">+{len(side.images) - 1} images</div>')
    return f'<figure class="card {kind}">{"".join(parts)}</figure>'


def shown_text(side: Side) -> str:
    """The text of an input as a reader sees it."""
    return unescape(remove_placeholders(side.text)).strip()


def _image(data: bytes) -> str:
    try:
        content = shrink(data, THUMBNAIL, QUALITY)
    except BadImageError:
        return '<div class="soft">image that cannot be read</div>'
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(content).decode()}">'


def histogram(similarity: Mapping[str, Sequence[int]]) -> str:
    """The histograms of the manifest as steps, each in percent of its own number."""
    bins = len(next(iter(similarity.values())))
    shares = {name: [100 * n / max(sum(similarity[name]), 1) for n in similarity[name]] for name in LEGEND}
    used = [number for number in range(bins) if any(values[number] for values in shares.values())] or [0, bins - 1]
    first, last = max(0, used[0] - 1), min(bins, used[-1] + 2)
    top = max(max(values) for values in shares.values()) or 1

    def across(number: float) -> float:
        return round(LEFT + (number - first) / (last - first) * (WIDTH - LEFT - 12), 1)

    def up(share: float) -> float:
        return round(HEIGHT - BOTTOM - share / top * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for name in LEGEND:
        steps = [f"M{across(first)},{up(0)}"]
        steps += [f"V{up(shares[name][number])}H{across(number + 1)}" for number in range(first, last)]
        parts.append(f'<path class="{name}" d="{"".join(steps)}V{up(0)}"/>')
    every = next(step for step in (1, 2, 4, 10) if (last - first) / step <= 8)
    marks = [number for number in range(first, last + 1) if (number - bins // 2) % every == 0]
    parts += [_text(across(number), HEIGHT - 18, f"{2 * number / bins - 1:.2g}", "middle") for number in marks]
    parts += [_text(LEFT - 5, up(share) + 4, f"{share:.0f} %", "end") for share in (0, top / 2, top)]
    parts.append(_text(across((first + last) / 2), HEIGHT - 3, "similarity", "middle"))
    lines = [f'<path class="axis" d="M{LEFT},{up(share)}H{WIDTH - 12}"/>' for share in (0, top / 2, top)]
    svg = f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram of similarities">'
    legend = "".join(
        f'<span><i class="{name}"></i>{about} ({sum(similarity[name]):,})</span>' for name, about in LEGEND.items()
    )
    return f'{svg}{"".join(lines + parts)}</svg><div class="legend">{legend}</div>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table within a section, which scrolls sideways on a small screen."""
    lines = [("th", columns), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) for tag, values in lines)
    return f'<div class="wide told"><table>{"".join(map("<tr>{}</tr>".format, cells))}</table></div>'


def common_text(sides: Sequence[Side]) -> str:
    """The text of all inputs, if it is one and they have images too ("Represent the given image."); else ""."""
    texts = {shown_text(side) for side in sides}
    return texts.pop() if len(texts) == 1 and len(sides) > 1 and all(side.images for side in sides) else ""
