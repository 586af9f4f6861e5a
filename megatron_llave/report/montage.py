"""Draws queries beside their best candidates as one PNG, with a panel per evaluation set.

panels.py chooses the queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_llave.batch import Side
from megatron_llave.data.image_files import decode_image
from megatron_llave.data.placeholders import unescape
from megatron_llave.files import atomic_write
from megatron_llave.report.palette import GREEN, GREY, INK, PALE, RED, WHITE

# Sizes in pixels.
MARGIN, GAP, CELL, QUERY_WIDTH, FRAME, LEGEND_HEIGHT, TITLE_HEIGHT = 28, 12, 116, 320, 5, 44, 64
COLUMNS = 2


@dataclass(frozen=True)
class Row:
    """A query and its candidates, the best one first."""

    query: Side
    candidates: list[tuple[Side, bool] | None]
    """One per heading of the panel: (candidate, whether it is right), or None for an empty place."""


@dataclass(frozen=True)
class Panel:
    """The queries of one evaluation set."""

    title: str
    about: str
    rows: list[Row]
    headings: tuple[str, ...]
    """Headings above the columns of candidates."""


def draw_montage(panels: Sequence[Panel], path: str | Path) -> None:
    """Draw the panels in COLUMNS columns.

    A green frame marks the right candidate, an orange one a best candidate that is wrong.
    """
    across = min(COLUMNS, max(1, len(panels)))
    down = -(-len(panels) // across)
    panel_width = QUERY_WIDTH + 2 * GAP + max((len(panel.headings) for panel in panels), default=0) * (CELL + GAP)
    panel_height = TITLE_HEIGHT + max((len(panel.rows) for panel in panels), default=0) * (CELL + GAP) + GAP
    size = (2 * MARGIN + across * panel_width + (across - 1) * 2 * MARGIN, LEGEND_HEIGHT + MARGIN + down * panel_height)
    canvas = Image.new("RGB", size, WHITE)
    _draw_legend(ImageDraw.Draw(canvas))
    for index, panel in enumerate(panels):
        # In the order of the table, down the first column, then down the second.
        column, row = divmod(index, down)
        corner = (MARGIN + column * (panel_width + 2 * MARGIN), LEGEND_HEIGHT + row * panel_height)
        _draw_panel(canvas, corner, panel)
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _draw_legend(draw: ImageDraw.ImageDraw) -> None:
    left = MARGIN
    for colour, text in ((GREEN, "right candidate"), (RED, "best candidate, but wrong")):
        draw.rectangle((left, 16, left + 22, 38), outline=colour, width=FRAME)
        draw.text((left + 32, 27), text, INK, _font(15), anchor="lm")
        left += 62 + round(_font(15).getlength(text))


def _draw_panel(canvas: Image.Image, corner: tuple[int, int], panel: Panel) -> None:
    """Draw the title, then a row per query."""
    draw = ImageDraw.Draw(canvas)
    left, top = corner
    title = _font(18, bold=True)
    draw.text((left, top + 22), panel.title, INK, title, anchor="lm")
    draw.text((left + round(title.getlength(panel.title)) + 14, top + 23), panel.about, GREY, _font(15), anchor="lm")
    first = left + QUERY_WIDTH + 2 * GAP
    draw.text((left, top + 50), "query", GREY, _font(13), anchor="lm")
    for rank, heading in enumerate(panel.headings):
        draw.text((first + rank * (CELL + GAP) + CELL // 2, top + 50), heading, GREY, _font(13), anchor="mm")
    # A text that all candidates have ("Represent the given image.") is left out.
    has_texts = len({shown[0].text for row in panel.rows for shown in row.candidates if shown}) > 1
    for number, row in enumerate(panel.rows):
        y = top + TITLE_HEIGHT + number * (CELL + GAP)
        _draw_side(canvas, row.query, (left, y, left + QUERY_WIDTH, y + CELL))
        for rank, candidate in enumerate(row.candidates):
            if candidate is None:
                continue
            side, is_right = candidate
            x = first + rank * (CELL + GAP)
            box = (x, y, x + CELL, y + CELL)
            _draw_side(canvas, side, box, with_text=has_texts)
            if is_right or rank == 0:
                draw.rectangle(box, outline=GREEN if is_right else RED, width=FRAME)


def _draw_side(canvas: Image.Image, side: Side, box: tuple[int, int, int, int], with_text: bool = True) -> None:
    """Draw the image and the text of an input side by side in a wide box, one above the other in a square box."""
    text = unescape(side.text) if with_text or not side.images else ""
    text += f" (+{len(side.images) - 1} images)" if len(side.images) > 1 else ""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(box, fill=PALE)
    left, top, right, bottom = (box[0] + FRAME, box[1] + FRAME, box[2] - FRAME, box[3] - FRAME)
    is_wide = right - left > 2 * (bottom - top)
    if side.images:
        height = bottom - top if is_wide or not text else (bottom - top) * 3 // 5
        width = (right - left) // 2 if is_wide and text else right - left
        image = _scaled(side.images[0], (width, height))
        x = left if is_wide else (left + right - image.width) // 2
        canvas.paste(image, (x, top + (height - image.height) // 2))
        left, top = (left + image.width, top) if is_wide else (left, top + height)
    if text:
        size = 15 if is_wide else 13
        _draw_text(draw, text, (left + 4, top + 2, right - 2, bottom), size)


def _scaled(encoded: bytes, limit: tuple[int, int]) -> Image.Image:
    """The decoded image, transparency on white, scaled up or down to fit into `limit`."""
    image = decode_image(encoded)
    scale = min(limit[0] / image.width, limit[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, which every machine has."""
    from matplotlib import font_manager  # here, because training imports this module and seldom draws

    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(wanted), size)


def _draw_text(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int) -> None:
    """Draw wrapped text in the vertical middle of the box; text that does not fit ends in dots."""
    font, spacing = _font(size), size + 4
    lines = wrap_text(text, font, box[2] - box[0])
    room = max(1, (box[3] - box[1]) // spacing)
    if len(lines) > room:
        last = lines[room - 1]
        while last and font.getlength(last + "...") > box[2] - box[0]:
            last = last[:-1]
        lines = [*lines[: room - 1], last.rstrip() + "..."]
    y = (box[1] + box[3] - len(lines) * spacing) // 2
    for line in lines:
        draw.text((box[0], y), line, INK, font)
        y += spacing


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels, between words, or within a word that is too long for a line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:
            cut = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines
