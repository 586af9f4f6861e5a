"""Curves of runs as one HTML page: values under the pointer, zoom, runs on and off; for llave plot.

The page has its numbers and its script in it and fetches nothing. plots.py draws the same panels as a PNG.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.files import write_text
from megatron_llave.options.plot import ALONG
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.plots import LINE_STYLES, PANELS, SUBSET_COLOURS, place_of, running_mean, values_of

MOST_POINTS = 1000
"""Points of a curve. A longer one has the least and the greatest value of equal parts, so that every peak is there."""
DIGITS = 5
"""Significant digits of the numbers in the page."""
DARK_COLOURS = "#9A8CFF #F19CA9 #5CC46C #88CCEE #D77FD3 #D6D65C #5FD3BC #E0669B #E6D98A".split()
"""Colours of the runs on a dark page, in the order of SUBSET_COLOURS."""
DASHES = {"-": "none", "--": "6 4", ":": "2 3"}

ABOUT = (
    "Dots are the values of steps, lines their running mean. Point at a panel to read the lines; drag over a part "
    "of it to enlarge that in all panels; a double click shows everything again."
)

STYLE = """
.bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: center;
  padding: .5rem 0; background: var(--back); z-index: 1; }
.bar label { display: inline-flex; gap: .35rem; align-items: center; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem 1.5rem; }
.panel h2 { font-size: 1rem; margin: .3rem 0 0; }
.panel svg { width: 100%; touch-action: pan-y; cursor: crosshair; user-select: none; }
.read { min-height: 1.5em; font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.read span { margin-right: .9em; white-space: nowrap; } .read b { font-weight: 600; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--grid); }
svg .guide { stroke: var(--soft); stroke-dasharray: 3 3; } svg .band { fill: var(--soft); opacity: .18; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .dot { opacity: .3; }
td:first-child { white-space: normal; min-width: 9rem; } td:last-child, th:last-child { overflow-wrap: normal; }
.key { width: 1.6rem; height: 0; border-top: 3px solid; }
:root { --back: #fff; --soft: #666; --grid: #e4e4e4; LIGHT }
@media (prefers-color-scheme: dark) { :root { --back: #181818; --soft: #aaa; --grid: #3a3a3a; DARK } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [width, height, left, right, top_, bottom] = [440, 230, 58, 8, 8, 36];
const inner = width - left - right, tall = height - top_ - bottom;
const hidden = new Set();
let along = data.along, range = null;
const space = document.querySelector(".panel svg")?.namespaceURI;

function make(parent, tag, attributes, text) {
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}
function shown(value) {
  const size = Math.abs(value);
  return size >= 1e6 || (size && size < 1e-3) ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")
    : String(Number(value.toPrecision(4)));
}
function marks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-6; n++) found.push(n * step);
  return found;
}
function span(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  const margin = (high - low || Math.abs(high) || 1) * .04;
  return [low - margin, high + margin];
}
function visible(panel) { return panel.curves.filter(curve => !hidden.has(curve.run)); }
function whole() {
  let low = Infinity, high = -Infinity;
  for (const panel of data.panels) for (const curve of visible(panel)) {
    const places = curve[along];
    if (places.length) { low = Math.min(low, places[0]); high = Math.max(high, places[places.length - 1]); }
  }
  return low > high ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high];
}
function draw(panel) {
  const svg = panel.svg, [x0, x1] = range || whole(), values = [];
  svg.replaceChildren();
  for (const curve of visible(panel)) curve[along].forEach((x, n) => {
    if (x >= x0 && x <= x1) { values.push(curve.line[n]); if (curve.dots) values.push(curve.dots[n]); }
  });
  const [y0, y1] = span(values);
  const across = x => left + (x - x0) / (x1 - x0) * inner, up = y => top_ + (y1 - y) / (y1 - y0) * tall;
  panel.back = x => x0 + (x - left) / inner * (x1 - x0);
  panel.across = across; panel.up = up;
  for (const y of marks(y0, y1, 5)) {
    make(svg, "line", {x1: left, x2: width - right, y1: up(y), y2: up(y), class: "grid"});
    make(svg, "text", {x: left - 6, y: up(y) + 4, "text-anchor": "end"}, shown(y));
  }
  for (const x of marks(x0, x1, 6)) {
    make(svg, "line", {x1: across(x), x2: across(x), y1: top_, y2: height - bottom, class: "grid"});
    make(svg, "text", {x: across(x), y: height - bottom + 15, "text-anchor": "middle"}, shown(x));
  }
  make(svg, "text", {x: width - right, y: height - 4, "text-anchor": "end"}, along);
  make(svg, "text", {x: left, y: height - 4}, panel.unit);
  const inside = make(svg, "svg", {x: left, y: 0, width: inner, height, viewBox: `${left} 0 ${inner} ${height}`});
  for (const curve of visible(panel)) {
    const colour = `var(--run${data.runs[curve.run].colour})`, points = curve[along].map((x, n) => [across(x), n]);
    if (curve.dots) for (const [x, n] of points) if (x >= left - 2 && x <= width - right + 2)
      make(inside, "circle", {cx: x, cy: up(curve.dots[n]), r: 1.6, class: "dot", style: `fill: ${colour}`});
    const path = points.map(([x, n]) => `${x.toFixed(1)},${up(curve.line[n]).toFixed(1)}`).join(" ");
    const style = `stroke: ${colour}; stroke-dasharray: ${data.runs[curve.run].dash}`;
    make(inside, "polyline", {points: path, class: "line", style});
    if (curve.marked) for (const [x, n] of points)
      make(inside, "circle", {cx: x, cy: up(curve.line[n]), r: 3.5, style: `fill: ${colour}`});
  }
  panel.guide = make(svg, "line", {y1: top_, y2: height - bottom, class: "guide", visibility: "hidden"});
  panel.band = make(svg, "rect", {y: top_, height: tall, class: "band", visibility: "hidden"});
}
function nearest(places, x) {
  let low = 0, high = places.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (places[middle] < x) low = middle + 1; else high = middle; }
  return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
}
function read(x) {
  for (const panel of data.panels) {
    panel.read.replaceChildren();
    panel.guide.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) continue;
    for (const end of ["x1", "x2"]) panel.guide.setAttribute(end, panel.across(x));
    const place = panel.read.appendChild(document.createElement("span"));
    place.textContent = `${along} ${shown(along === "hours" ? x : Math.round(x))}`;
    for (const curve of visible(panel)) {
      const places = curve[along], near = nearest(places, x), slack = (panel.back(width) - panel.back(0)) / 100;
      // A run that has ended before, or begins later, has no value here.
      if (!places.length || x < places[0] - slack || x > places[places.length - 1] + slack) continue;
      const one = panel.read.appendChild(document.createElement("span")), run = data.runs[curve.run];
      const value = one.appendChild(document.createElement("b"));
      value.textContent = shown(curve.line[near]);
      one.style.color = `var(--run${run.colour})`;
      one.append(data.runs.length > 1 ? ` ${run.name}` : "");
    }
  }
}
function redraw() { data.panels.forEach(draw); read(null); }
function where(panel, event) {
  const box = panel.svg.getBoundingClientRect();
  return Math.min(width - right, Math.max(left, (event.clientX - box.left) / box.width * width));
}
data.panels.forEach((panel, number) => {
  const node = document.getElementById(`panel${number}`);
  panel.svg = node.querySelector("svg");
  panel.read = node.querySelector(".read");
  let start = null;
  panel.svg.addEventListener("pointerdown", event => {
    start = where(panel, event);
    if (event.pointerType === "mouse") panel.svg.setPointerCapture(event.pointerId);
  });
  panel.svg.addEventListener("pointermove", event => {
    const x = where(panel, event);
    read(panel.back(x));
    panel.band.setAttribute("visibility", start === null ? "hidden" : "visible");
    if (start === null) return;
    panel.band.setAttribute("x", Math.min(x, start));
    panel.band.setAttribute("width", Math.abs(x - start));
  });
  panel.svg.addEventListener("pointerup", event => {
    const ends = start === null ? [0, 0] : [start, where(panel, event)].sort((a, b) => a - b);
    start = null;
    if (ends[1] - ends[0] > 6) { range = ends.map(panel.back); redraw(); }
  });
  for (const name of ["pointercancel", "pointerleave"]) panel.svg.addEventListener(name, () => {
    if (name === "pointercancel") start = null;
    read(null);
  });
  panel.svg.addEventListener("dblclick", () => { range = null; redraw(); });
});
document.getElementById("along").addEventListener("change", event => {
  along = event.target.value; range = null; redraw();
});
document.getElementById("all").addEventListener("click", () => { range = null; redraw(); });
document.querySelectorAll("[data-run]").forEach(box => box.addEventListener("change", () => {
  if (box.checked) hidden.delete(Number(box.dataset.run)); else hidden.add(Number(box.dataset.run));
  redraw();
}));
redraw();
"""

Runs = Mapping[str, list[dict[str, Any]]]


def write_curves_page(
    runs: Runs, evaluations: Mapping[str, list[tuple[int, float]]], path: str | Path, along: str
) -> None:
    """Write the page, with the panels and arguments of `plots.plot_runs`; its axis can be changed in the page."""
    panels = _panels(runs, evaluations)
    data = {"along": along, "runs": [{"name": name, **_look(n)} for n, name in enumerate(runs)], "panels": panels}
    # No value can end the element that holds the numbers.
    numbers = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    body = (
        _controls(list(runs), along) + f'<div class="panels">{"".join(map(_frame, range(len(panels)), panels))}</div>'
    )
    body += f'<script type="application/json" id="data">{numbers}</script>'
    colours = [
        " ".join(f"--run{n}: {colour};" for n, colour in enumerate(colours))
        for colours in (SUBSET_COLOURS, DARK_COLOURS)
    ]
    style = STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1])
    title = "Curves of " + (next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs")
    sections = [Section("Curves", ABOUT, inner=body), _final_values(runs, evaluations)]
    write_text(path, html_page(title, "", sections, style, SCRIPT))


def _panels(runs: Runs, evaluations: Mapping[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Title, unit and curves of each panel that has any value."""
    of_all = [(name, records, _places(records)) for name, records in runs.items()]
    panels = []
    for title, unit, value in PANELS:
        is_plain = title == "learning rate"
        values = [values_of(value, records) for _, records, _ in of_all]
        curves = [_curve(n, of_all[n][2], one, is_plain) for n, one in enumerate(values)]
        panels.append({"title": title, "unit": unit, "curves": curves})
    scores = []
    for number, (name, records, places) in enumerate(of_all):
        at = {record["step"]: index for index, record in enumerate(records)}
        found = [(at[step], score) for step, score in evaluations.get(name, []) if step in at]
        chosen = {along: one[[index for index, _ in found]] for along, one in places.items()}
        scores.append(_curve(number, chosen, np.array([score for _, score in found]), True) | {"marked": True})
    panels.append({"title": "evaluation while training", "unit": "mean Precision@1 (%)", "curves": scores})
    for subset in sorted({record["subset"] for records in runs.values() for record in records if "subset" in record}):
        curves = []
        for number, (_, records, places) in enumerate(of_all):
            chosen = [index for index, record in enumerate(records) if record.get("subset") == subset]
            losses = np.array([records[index].get("loss") for index in chosen], dtype=float)
            curves.append(_curve(number, {along: one[chosen] for along, one in places.items()}, losses))
        panels.append({"title": f"loss of subset {subset}", "unit": "contrastive loss (nats)", "curves": curves})
    return [panel for panel in panels if any(curve["line"] for curve in panel["curves"])]


def _places(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {along: place_of(records, along) for along in ALONG}


def _curve(run: int, places: Mapping[str, np.ndarray], values: np.ndarray, is_plain: bool = False) -> dict[str, Any]:
    """Points of a curve; a plain one has no noise, and so no running mean beside its values."""
    valid = np.isfinite(values)
    values = values[valid]
    line = values if is_plain else running_mean(values)
    kept = thinned(values)
    drawn = {along: _rounded(place[valid][kept], 8) for along, place in places.items()}
    dots = {} if is_plain else {"dots": _rounded(values[kept])}
    return {"run": run, **drawn, "line": _rounded(line[kept]), **dots}


def thinned(values: np.ndarray) -> np.ndarray:
    """Indices of at most MOST_POINTS of the values: the least and the greatest of equal parts, and both ends."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), (MOST_POINTS - 2) // 2)
    peaks = [part[chosen(values[part])] for part in parts for chosen in (np.argmin, np.argmax)]
    return np.unique([0, *peaks, len(values) - 1])


def _rounded(values: np.ndarray, digits: int = DIGITS) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _look(number: int) -> dict[str, Any]:
    count = len(SUBSET_COLOURS)
    return {"colour": number % count, "dash": DASHES[LINE_STYLES[number // count % len(LINE_STYLES)]]}


def _controls(names: Sequence[str], along: str) -> str:
    options = "".join(f"<option{' selected' * (one == along)}>{one}</option>" for one in ALONG)
    boxes = [
        f'<label><input type="checkbox" checked data-run="{n}"><span class="key" '
        f'style="border-top-color: var(--run{_look(n)["colour"]})"></span>{html.escape(name)}</label>'
        for n, name in enumerate(names)
    ]
    choice = f'<label>along <select id="along">{options}</select></label><button id="all">show everything</button>'
    return f'<div class="bar">{choice}{"".join(boxes)}</div>'


def _frame(number: int, panel: Mapping[str, Any]) -> str:
    title = html.escape(panel["title"])
    drawing = f'<svg viewBox="0 0 440 230" role="img" aria-label="{title}"></svg>'
    return f'<div class="panel" id="panel{number}"><h2>{title}</h2><div class="read"></div>{drawing}</div>'


def _final_values(runs: Runs, evaluations: Mapping[str, list[tuple[int, float]]]) -> Section:
    """The table with the last point of each line, and the last and the best evaluation."""

    def row(title: str, of_run: Mapping[str, float], digits: int = 4) -> tuple[str, ...]:
        return title, *("-" if math.isnan(of_run[name]) else f"{of_run[name]:.{digits}g}" for name in runs)

    rows = [("steps", *(str(records[-1]["step"]) for records in runs.values()))]
    rows.append(row("hours", {name: place_of(records, "hours")[-1] for name, records in runs.items()}, 3))
    for title, unit, value in PANELS:
        last = {}
        for name, records in runs.items():
            values = values_of(value, records)
            values = values[np.isfinite(values)]
            means = values if title == "learning rate" else running_mean(values)
            last[name] = means[-1] if len(means) else math.nan
        rows.append(row(title if unit in title else f"{title}, {unit}", last))
    scores = {name: [s for _, s in evaluations.get(name, []) if math.isfinite(s)] or [math.nan] for name in runs}
    rows.append(row("last mean Precision@1 (%)", {name: one[-1] for name, one in scores.items()}))
    rows.append(row("best mean Precision@1 (%)", {name: max(one) for name, one in scores.items()}))
    about = "The last value of each line: the running mean over the last steps, of a learning rate the value itself."
    return Section("Final values", about, ("", *runs), [one for one in rows if set(one[1:]) != {"-"}])
