"""What an evaluation found, as numbers, tables and pictures, made of its results and the records of the run's log.

Called by the tools after an evaluation. Files: report.json, report.md, loss.png, similarities.png, montage.png.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from megatron_llave.batch import Side
from megatron_llave.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    RED,
    WHITE,
    label_axes,
    plot_loss,
    replacing,
    save_png,
)

COLUMNS = ("data set", "meta-task", "split", "queries", "candidates", "chance", "Precision@1")
LONG_LISTS = ("positive", "hardest_negative", "top", "positives", "queries", "candidates")

# Montage, in pixels.
MARGIN, GAP, CELL, QUERY_WIDTH, FRAME, LEGEND_HEIGHT, TITLE_HEIGHT = 28, 12, 116, 320, 5, 44, 64
MONTAGE_COLUMNS = 2


@dataclass
class SetResult:
    """One evaluation set, scored."""

    name: str
    meta_task: str
    """classification, vqa, retrieval or grounding."""
    split: str
    """ind, ood or seen; a seen set is a test of memory and is left out of every mean."""
    precision_at_1: float
    """Percent."""
    chance: float
    """Precision@1 of guessing, percent."""
    num_queries: int
    num_candidates: int
    overlap: float
    """Overlap coefficient of `positive` and `hardest_negative`, 0 to 1."""
    positive: list[float]
    """Per query, similarity of its right candidate."""
    hardest_negative: list[float]
    """Per query, largest similarity of another candidate."""
    top: list[list[int]]
    """Per query, the best candidates, best first: indices into `candidates`, negative ones stand for nothing."""
    positives: list[int]
    """Per query, index of its right candidate."""
    queries: list[str]
    """Input keys."""
    candidates: list[str]
    """Input keys."""


def summarise(results: list[SetResult]) -> dict[str, Any]:
    """Means of Precision@1 in percent over the held-out sets, every set counting the same; None where there is none.

    Returns:
        meta_tasks: {meta-task: mean}, and the means over the sets of split ind and ood and over both (held_out).
    """
    held_out = [result for result in results if result.split != "seen"]
    meta_tasks = dict.fromkeys(result.meta_task for result in held_out)
    return {
        "meta_tasks": {task: _mean([r for r in held_out if r.meta_task == task]) for task in meta_tasks},
        "ind": _mean([result for result in held_out if result.split == "ind"]),
        "ood": _mean([result for result in held_out if result.split == "ood"]),
        "held_out": _mean(held_out),
    }


def _mean(results: list[SetResult]) -> float | None:
    return sum(result.precision_at_1 for result in results) / len(results) if results else None


def write_json(results: list[SetResult], path: str | Path, extra: dict[str, Any]) -> None:
    """Write `extra`, the means and every set's numbers; the lists over queries and candidates stay out."""
    short = [{key: value for key, value in asdict(one).items() if key not in LONG_LISTS} for one in results]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**extra, "means": summarise(results), "sets": short}, indent=2) + "\n")


def _set_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    rows = []
    for one in results:
        counts = (str(one.num_queries), str(one.num_candidates))
        rows.append((one.name, one.meta_task, one.split, *counts, f"{one.chance:.3g}", f"{one.precision_at_1:.1f}"))
    return rows


def _mean_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    means = summarise(results)
    named = [(f"mean {task}", mean) for task, mean in means["meta_tasks"].items()]
    named += [("mean IND", means["ind"]), ("mean OOD", means["ood"]), ("mean of all held-out sets", means["held_out"])]
    return [(name, "", "", "", "", "", f"{mean:.1f}") for name, mean in named if mean is not None]


def markdown_table(results: list[SetResult]) -> str:
    """One row per set, then the means; chance and Precision@1 in percent."""
    alignment = ["---"] * 3 + ["---:"] * 4
    means = [tuple(f"**{cell}**" if cell else "" for cell in row) for row in _mean_rows(results)]
    rows = [COLUMNS, alignment, *_set_rows(results), *means]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def print_table(results: list[SetResult]) -> None:
    """Print the sets and the means to the terminal."""
    table = Table(title="Precision@1 (%)")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 3 else "right")
    for row in _set_rows(results):
        table.add_row(*row)
    table.add_section()
    for row in _mean_rows(results):
        table.add_row(*row, style="bold")
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width; rich would assume 80 and cut names
    console.print(table, markup=False)


def plot_similarities(results: list[SetResult], path: str | Path, bins: int = 30) -> None:
    """One histogram panel per set, positives against hardest negatives, as a PNG."""
    across = min(4, max(1, len(results)))
    down = max(1, -(-len(results) // across))
    figure = Figure(figsize=(0.8 + 3.3 * across, 0.9 + 2.7 * down), layout="constrained")
    for index, result in enumerate(results):
        axes = figure.add_subplot(down, across, index + 1)
        samples = [[x for x in sample if np.isfinite(x)] for sample in (result.positive, result.hardest_negative)]
        edges = np.histogram_bin_edges(samples[0] + samples[1], bins)
        for sample, colour, label in zip(samples, (BLUE, ORANGE), ("positive", "hardest negative"), strict=True):
            weights = np.full(len(sample), 100 / max(1, len(sample)))
            colours = {"facecolor": (colour, 0.35), "edgecolor": colour}
            axes.hist(sample, edges, weights=weights, histtype="stepfilled", linewidth=1.4, label=label, **colours)
        label_axes(axes, f"{result.name}\noverlap {result.overlap:.2f}", "", "")
        if index % across == 0:
            axes.set_ylabel("share of queries (%)")
        if index + across >= len(results):
            axes.set_xlabel("cosine similarity")
    if results:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    save_png(figure, path)


def plot_montage(
    results: list[SetResult], inputs: dict[str, Side], path: str | Path, per_set: int = 3, k: int = 5
) -> None:
    """Some queries of each set, evenly spread over it, with their k best candidates, as a PNG.

    A green frame marks the right candidate, a red one a best candidate that is wrong.
    """
    across = min(MONTAGE_COLUMNS, max(1, len(results)))
    down = -(-len(results) // across)
    panel_width = QUERY_WIDTH + 2 * GAP + k * (CELL + GAP)
    panel_height = TITLE_HEIGHT + per_set * (CELL + GAP) + GAP
    size = (2 * MARGIN + across * panel_width + (across - 1) * 2 * MARGIN, LEGEND_HEIGHT + MARGIN + down * panel_height)
    canvas = Image.new("RGB", size, WHITE)
    _draw_legend(ImageDraw.Draw(canvas))
    for index, result in enumerate(results):
        # Down the first column, then the second: the order of the table.
        column, row = divmod(index, down)
        corner = (MARGIN + column * (panel_width + 2 * MARGIN), LEGEND_HEIGHT + row * panel_height)
        _draw_set(canvas, corner, result, inputs, per_set, k)
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _draw_legend(draw: ImageDraw.ImageDraw) -> None:
    left = MARGIN
    for colour, text in ((GREEN, "right candidate"), (RED, "best candidate, but wrong")):
        draw.rectangle((left, 16, left + 22, 38), outline=colour, width=FRAME)
        draw.text((left + 32, 27), text, INK, _font(15), anchor="lm")
        left += 62 + round(_font(15).getlength(text))


def _draw_set(
    canvas: Image.Image, corner: tuple[int, int], result: SetResult, inputs: dict[str, Side], per_set: int, k: int
) -> None:
    """One panel: title, then a row per query."""
    draw = ImageDraw.Draw(canvas)
    left, top = corner
    title = _font(18, bold=True)
    draw.text((left, top + 22), result.name, INK, title, anchor="lm")
    score = f"Precision@1 {result.precision_at_1:.1f} % (chance {result.chance:.3g} %)"
    about = f"{result.meta_task}, {result.split}, {score}"
    draw.text((left + round(title.getlength(result.name)) + 14, top + 23), about, GREY, _font(15), anchor="lm")
    first = left + QUERY_WIDTH + 2 * GAP
    draw.text((left, top + 50), "query", GREY, _font(13), anchor="lm")
    for rank in range(k):
        draw.text((first + rank * (CELL + GAP) + CELL // 2, top + 50), str(rank + 1), GREY, _font(13), anchor="mm")
    # What all candidates say ("Represent the given image.") tells none of them apart.
    is_told_apart = len({inputs[key].text for key in result.candidates}) > 1
    count = min(per_set, len(result.queries))
    chosen = [number * len(result.queries) // count for number in range(count)]
    for row, query in enumerate(chosen):
        y = top + TITLE_HEIGHT + row * (CELL + GAP)
        _draw_side(canvas, inputs[result.queries[query]], (left, y, left + QUERY_WIDTH, y + CELL))
        for rank, candidate in enumerate(result.top[query][:k]):
            if candidate < 0:
                continue
            x = first + rank * (CELL + GAP)
            box = (x, y, x + CELL, y + CELL)
            _draw_side(canvas, inputs[result.candidates[candidate]], box, with_text=is_told_apart)
            is_right = candidate == result.positives[query]
            if is_right or rank == 0:
                draw.rectangle(box, outline=GREEN if is_right else RED, width=FRAME)


def _draw_side(canvas: Image.Image, side: Side, box: tuple[int, int, int, int], with_text: bool = True) -> None:
    """The picture and the text of an input: beside each other in a wide box, one above the other in a square one."""
    text = side.text if with_text or not side.images else ""
    text += f" (+{len(side.images) - 1} images)" if len(side.images) > 1 else ""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(box, fill=PALE)
    left, top, right, bottom = (box[0] + FRAME, box[1] + FRAME, box[2] - FRAME, box[3] - FRAME)
    is_wide = right - left > 2 * (bottom - top)
    if side.images:
        height = bottom - top if is_wide or not text else (bottom - top) * 3 // 5
        width = (right - left) // 2 if is_wide and text else right - left
        picture = _picture(side.images[0], (width, height))
        x = left if is_wide else (left + right - picture.width) // 2
        canvas.paste(picture, (x, top + (height - picture.height) // 2))
        left, top = (left + picture.width, top) if is_wide else (left, top + height)
    if text:
        size = 15 if is_wide else 13
        _draw_text(draw, text, (left + 4, top + 2, right - 2, bottom), size)


def _picture(encoded: bytes, limit: tuple[int, int]) -> Image.Image:
    """Decoded, on white, as large as fits into `limit`; small pictures are enlarged."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    flat = Image.new("RGBA", picture.size, WHITE)
    flat.alpha_composite(picture)
    scale = min(limit[0] / flat.width, limit[1] / flat.height)
    size = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    return flat.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which is there on every machine."""
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(wanted), size)


def _draw_text(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int) -> None:
    """Text wrapped into the box, in its vertical middle; what does not fit ends in dots."""
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
    """Lines no wider than `width` pixels, broken between words, or within a word that is too long for a line."""
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


def write_report(
    results: list[SetResult], records: list[dict[str, Any]], inputs: dict[str, Side], directory: str | Path
) -> None:
    """Write all files of the report into `directory`, each replacing an old one whole; no loss.png without records."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {"Similarities": "similarities.png", "Examples": "montage.png"}
    if records:
        plot_loss(records, directory / "loss.png")
        pictures = {"Training": "loss.png", **pictures}
    plot_similarities(results, directory / pictures["Similarities"])
    plot_montage(results, inputs, directory / pictures["Examples"])
    write_json(results, directory / "report.json", {"steps": records[-1]["step"]} if records else {})
    note = "Chance and Precision@1 in percent. Seen sets were trained on: they test memory and are in no mean."
    sections = "".join(f"\n## {title}\n\n![{title}]({file})\n" for title, file in pictures.items())
    with replacing(directory / "report.md") as temporary:
        temporary.write_text(f"# Evaluation\n\n{note}\n\n{markdown_table(results)}{sections}", encoding="utf-8")
