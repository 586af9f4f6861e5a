"""Draws the figures of docs/how_it_works.md: `python docs/figures/draw.py` writes the SVG files beside this one.

Colours follow the scheme of the page in the site, and that of the system elsewhere. A test compares the files.
"""

from pathlib import Path
from xml.sax.saxutils import escape

LIGHT = "--ink:#222;--faint:#777;--paper:#fff;--a:#3b6fb6;--b:#c8660a;--c:#3c8a36;--d:#9a4f8c"
DARK = "--ink:#e6e6e6;--faint:#a0a0a0;--paper:#1e2129;--a:#7fb0f0;--b:#f2a65a;--c:#7ecb77;--d:#d79bcb"
STYLE = f"""
.figure{{{LIGHT};font:13px sans-serif}}
@media (prefers-color-scheme:dark){{.figure{{{DARK}}}}}
[data-md-color-scheme=default] .figure{{{LIGHT}}}
[data-md-color-scheme=slate] .figure{{{DARK}}}
.figure text{{fill:var(--ink)}}.figure .small{{font-size:11px}}.figure .note{{font-size:11px;fill:var(--faint)}}
.figure .bold{{font-weight:bold}}
.figure .line{{stroke:var(--faint);stroke-width:1.3;fill:none}}.figure .head{{fill:var(--faint)}}
"""
RANKS = "abcd"
"""The names of the colours of the first four ranks or replicas."""


class Figure:
    """An SVG that grows by what is drawn on it. Coordinates are pixels from its upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, []

    def box(self, x: float, y: float, w: float, h: float, colour: str, fill: float = 0.2, text: str = "") -> None:
        """A rectangle in the colour of a rank, with a text in its middle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" '
            f'style="fill:var(--{colour});fill-opacity:{fill:g};stroke:var(--{colour})"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4.5, text, anchor="middle")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text; `kind` is bold, small, or note (small and faint)."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        """A line through points with a head at its end."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="line" d="M{path}"/>')
        if head:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            ux, uy = (x - x0) / length, (y - y0) / length
            corners = [(x, y), (x - 8 * ux - 4 * uy, y - 8 * uy + 4 * ux), (x - 8 * ux + 4 * uy, y - 8 * uy - 4 * ux)]
            self.parts.append(f'<path class="head" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in corners)} Z"/>')

    def svg(self) -> str:
        """The whole file."""
        width, height = self.size
        return (
            f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def step() -> Figure:
    """Four data-parallel ranks: embed, gather, similarities of all pairs, gradients, second pass."""
    figure = Figure(960, 345, "One training step on four data-parallel ranks")
    for x, title in ((20, "1  embed"), (250, "2  gather"), (430, "3  loss"), (692, "4  embed again, backward")):
        figure.text(x, 24, title, "bold")
    figure.text(20, 44, "no gradients kept", "note")
    figure.text(250, 44, "all targets, to all", "note")
    figure.text(430, 44, "each rank: its own rows of all pairs", "note")
    figure.text(692, 44, "of sum(embedding x gradient)", "note")
    for rank, colour in enumerate(RANKS):
        y = 62 + 62 * rank
        figure.text(20, y + 25, f"rank {rank}")
        for micro in range(3):
            figure.box(72 + 46 * micro, y + 4, 40, 32, colour, 0.2, f"m{micro}")
        figure.arrow((212, y + 20), (248, y + 20))
        figure.box(254, y + 4, 18, 32, colour, 0.75)
        figure.arrow((276, y + 20), (330, 184))
        figure.box(430, y + 6, 232, 52, colour, 0.08)
        for column, other in enumerate(RANKS):
            own = column == rank
            figure.box(434 + 57 * column, y + 10, 53, 44, other, 0.55 if own else 0.16)
        figure.text(434 + 57 * rank + 26, y + 36, "positives", "small", "middle")
        figure.arrow((664, y + 20), (690, y + 20))
        for micro in range(3):
            figure.box(694 + 46 * micro, y + 4, 40, 32, colour, 0.2, f"m{micro}")
        figure.arrow((834, y + 20), (866, 184))
    for row, colour in enumerate(RANKS):
        figure.box(336, 124 + 30 * row, 18, 30, colour, 0.75)
    figure.arrow((358, 184), (426, 184))
    figure.text(392, 174, "to each", "note", "middle")
    figure.text(392, 202, "rank", "note", "middle")
    figure.box(870, 160, 80, 66, "ink", 0.05)
    figure.text(910, 182, "sum over", "", "middle")
    figure.text(910, 199, "ranks, then", "", "middle")
    figure.text(910, 216, "AdamW", "", "middle")
    figure.text(
        430, 326, "Every other column is a negative, weighted by its hardness: exp(s / tau + alpha r).", "small"
    )
    figure.text(20, 326, "m0, m1, m2: micro batches of pairs", "note")
    return figure


def layout() -> Figure:
    """Eight GPUs at tensor 2 x pipeline 2 x data 2, and what each holds."""
    figure = Figure(960, 420, "Eight GPUs at tensor 2, pipeline 2 and data 2")
    for replica in range(2):
        x = 20 + 480 * replica
        colour = RANKS[replica]
        figure.text(
            x, 24, f"data-parallel replica {replica}: pairs {128 * replica + 1} to {128 * replica + 128}", "bold"
        )
        for stage in range(2):
            y = 44 + 180 * stage
            figure.text(x, y + 16, f"pipeline stage {stage}", "note")
            for tensor in range(2):
                rank = tensor + 2 * replica + 4 * stage
                left = x + 225 * tensor
                figure.box(left, y + 26, 205, 100, colour, 0.14)
                figure.text(left + 10, y + 46, f"GPU {rank}", "bold")
                half = ("1st", "2nd")[tensor]
                lines = (
                    [
                        f"vision encoder: {half} half",
                        f"token embedding: {half} half",
                        f"layers 1 to 14: {half} half",
                    ]
                    if stage == 0
                    else [f"layers 15 to 28: {half} half", "pools the last token", "128 pairs: embeddings, loss"]
                )
                for number, line in enumerate(lines):
                    figure.text(left + 10, y + 68 + 19 * number, line)
            figure.arrow((x + 206, y + 76), (x + 224, y + 76))
            figure.arrow((x + 224, y + 86), (x + 206, y + 86))
        figure.arrow((x + 102, 172), (x + 102, 248))
        figure.arrow((x + 327, 172), (x + 327, 248))
        figure.text(x + 215, 212, "hidden states", "note", "middle")
    for left in (122, 347):
        figure.arrow(
            (left, 352), (left, 366 + (left > 200) * 14), (left + 480, 366 + (left > 200) * 14), (left + 480, 352)
        )
        figure.arrow((left + 480, 366 + (left > 200) * 14), (left, 366 + (left > 200) * 14), (left, 352))
    figure.text(
        20,
        408,
        "Between the replicas: embeddings of all targets (4 with 6, 5 with 7), and sums of gradients of equal parts.",
        "note",
    )
    return figure


def passes() -> Figure:
    """What a rank computes and keeps over time in a step of four micro batches."""
    figure = Figure(960, 210, "The two passes of a step on one rank")
    figure.text(20, 24, "first pass", "bold")
    figure.text(20, 42, "forward, keeps embeddings alone", "note")
    figure.text(520, 24, "second pass", "bold")
    figure.text(520, 42, "forward and backward, keeps one micro batch", "note")
    for micro in range(4):
        figure.box(20 + 62 * micro, 60, 56, 40, "a", 0.2, f"F{micro}")
        figure.box(520 + 104 * micro, 60, 42, 40, "a", 0.2, f"F{micro}")
        figure.box(564 + 104 * micro, 60, 52, 40, "b", 0.25, f"B{micro}")
    figure.box(276, 60, 62, 40, "d", 0.2, "gather")
    figure.box(344, 60, 76, 40, "c", 0.25, "loss")
    figure.box(426, 60, 86, 40, "d", 0.2, "reduce")
    figure.text(20, 132, "memory", "note")
    heights = [5, 10, 15, 20, 24, 26, 26] + [40, 52, 26, 40, 52, 26, 40, 52, 26, 40, 52, 24]
    edges = [20, 82, 144, 206, 270, 340, 424, 520, 566, 616, 624, 670, 720, 728, 774, 824, 832, 878, 928]
    points = [(20.0, 196.0)]
    for left, height, right in zip(edges, heights, [*edges[1:], 940], strict=True):
        points += [(left, 196 - height), (right, 196 - height)]
    figure.arrow(*points, head=False)
    figure.text(290, 154, "embeddings and their gradients", "note")
    figure.text(760, 132, "plus the activations of one micro batch", "note", "middle")
    return figure


def packing() -> Figure:
    """The sequences of a micro batch, padded and packed."""
    figure = Figure(960, 285, "Four sequences, padded and packed")
    sequences = [
        ("query 0: image and text", 360, "a"),
        ("target 0", 70, "a"),
        ("query 1", 110, "b"),
        ("target 1: image", 240, "b"),
    ]
    figure.text(20, 24, "padded: every sequence is as long as the longest", "bold")
    for row, (name, tokens, colour) in enumerate(sequences):
        y = 36 + 30 * row
        figure.box(20, y, tokens, 24, colour, 0.25)
        figure.box(20 + tokens, y, 360 - tokens, 24, "faint", 0.05)
        figure.text(28, y + 16, name, "small")
        figure.box(20 + tokens - 8, y, 8, 24, colour, 0.9)
    figure.text(410, 70, "grey: computed and thrown away.", "note")
    figure.text(410, 90, "Full colour: the last token, which is pooled into the embedding.", "note")
    figure.text(20, 190, "packed: one row, in which attention does not cross sequences", "bold")
    x = 20
    for name, tokens, colour in sequences:
        figure.box(x, 202, tokens, 30, colour, 0.25)
        figure.box(x + tokens - 8, 202, 8, 30, colour, 0.9)
        figure.text(x + 6, 221, name.split(":")[0], "small")
        x += tokens
    figure.box(x, 202, 30, 30, "faint", 0.05)
    figure.text(
        20,
        256,
        "The vision encoder runs on tiles that exist; a text needs none. Only the end of a row is padded (on a GPU).",
        "note",
    )
    return figure


def context() -> Figure:
    """Which tokens of a packed row the context-parallel ranks have."""
    figure = Figure(960, 190, "A packed row on two context-parallel ranks")
    figure.text(20, 24, "a packed row of two sequences, each cut into 2C = 4 equal chunks", "bold")
    x = 20
    for name, tokens in (("sequence 0", 560), ("sequence 1", 340)):
        for chunk in range(4):
            figure.box(x, 38, tokens / 4, 34, "abba"[chunk], 0.25, str(chunk))
            x += tokens / 4
    for rank, chunks in enumerate(((0, 3), (1, 2))):
        y = 100 + 44 * rank
        figure.text(20, y + 22, f"context rank {rank}")
        x = 130
        for tokens in (560, 340):
            for chunk in chunks:
                figure.box(x, y, tokens / 4, 34, RANKS[rank], 0.25, str(chunk))
                x += tokens / 4
    figure.text(600, 122, "Early tokens see few keys and late ones many,", "note")
    figure.text(600, 140, "so a pair of an early and a late chunk", "note")
    figure.text(600, 158, "is the same amount of attention for each rank.", "note")
    return figure


FIGURES = {"step": step, "layout": layout, "passes": passes, "packing": packing, "context": context}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
