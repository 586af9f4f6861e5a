"""The page of curves: its numbers are those of the logs, names are only text, and a browser shows and enlarges them."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_llave.report import curves_page, plots
from megatron_llave.report.curves_page import thinned, write_curves_page

ODD = 'b</script><i>&"odd'
SCORES = {"a": [(10, 25.0), (20, 30.0), (30, 27.5)], ODD: []}


def records(steps: int, loss: float = 4.0) -> list[dict]:
    common = {"learning_rate": 1e-5, "gradient_norm": None, "pairs": 8, "seconds": 1.5, "save_seconds": 0.5}
    common |= {"positive_similarity": 0.5, "hardest_negative_similarity": 0.25, "data_seconds": 0.3}
    return [{"step": n, "subset": "xy"[n % 2], "loss": loss / n, **common} for n in range(1, steps + 1)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "curves.html"
    write_curves_page({"a": records(40), ODD: records(20, loss=2.0)}, SCORES, path, "pairs")
    return path


def numbers(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


def test_numbers_are_those_of_the_logs(page: Path) -> None:
    data = numbers(page)
    assert data["along"] == "pairs" and [run["name"] for run in data["runs"]] == ["a", ODD]
    panels = {panel["title"]: panel["curves"] for panel in data["panels"]}
    # Those without a value are left out.
    left = {"AUC of these two", "overlap of these two", "gradient norm, before clipping"}
    titles = [title for title, *_ in plots.PANELS if title not in left]
    assert list(panels) == [*titles, "evaluation while training", "loss of subset x", "loss of subset y"]
    one, other = panels["loss"]
    losses = np.array([4 / n for n in range(1, 41)])
    assert one["dots"] == pytest.approx(losses, rel=1e-4) and len(other["dots"]) == 20
    assert one["line"] == pytest.approx(plots.running_mean(losses), rel=1e-4)
    assert (one["step"][-1], one["pairs"][-1], one["hours"][-1]) == (40, 320, pytest.approx(80 / 3600))
    assert panels["loss of subset y"][0]["step"] == list(range(1, 41, 2))
    scored, without = panels["evaluation while training"]
    assert (scored["step"], scored["line"], without["line"]) == ([10, 20, 30], [25.0, 30.0, 27.5], [])


def test_names_are_text_and_nothing_but_the_script_may_run(page: Path) -> None:
    text = page.read_text()
    assert "<i>" not in text and text.count("</script>") == 2 and "b&lt;/script&gt;&lt;i&gt;&amp;&quot;odd" in text
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_table_has_the_last_values(page: Path) -> None:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page.read_text())
    table = {name: values for name, *values in (re.findall(r"<td>(.*?)</td>", row) for row in rows)}
    last = plots.running_mean(np.array([4 / n for n in range(1, 41)]))[-1]
    assert table["steps"] == ["40", "20"] and table["loss, contrastive loss (nats)"][0] == f"{last:.4g}"
    assert table["learning rate"] == ["1e-05", "1e-05"] and table["throughput, pairs per second"] == ["5.333"] * 2
    assert table["last mean Precision@1 (%)"] == ["27.5", "-"] and table["best mean Precision@1 (%)"] == ["30", "-"]
    assert "gradient norm, before clipping" not in table  # which nobody has


def test_long_curves_keep_their_peaks_and_ends() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[70_001, 31]] = 50, -50
    kept = thinned(values)
    assert len(kept) <= curves_page.MOST_POINTS and {0, 31, 70_001, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all() and np.diff(kept).max() < 2 * 2 * 100_000 / curves_page.MOST_POINTS + 2
    assert thinned(np.zeros(3)).tolist() == [0, 1, 2] and thinned(np.zeros(0)).tolist() == []


def test_a_browser_reads_enlarges_and_hides(page: Path, browser) -> None:
    said, asked = [], []
    shown = browser.new_page(viewport={"width": 1000, "height": 800})
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    box = shown.locator("#panel0 > svg").bounding_box()

    def point(share: float) -> tuple[float, float]:
        """A place at this share of the axis of the first panel."""
        return box["x"] + box["width"] * (58 + share * 374) / 440, box["y"] + box["height"] / 2

    def places() -> list[str]:
        return shown.locator("#panel0 > svg > text[text-anchor=middle]").all_text_contents()

    assert places() == ["100", "200", "300"]
    shown.select_option("#along", "step")
    shown.mouse.move(*point((10 - 1) / 39))
    mean = [
        plots.running_mean(np.array([loss / n for n in range(1, steps + 1)]))[9] for loss, steps in ((4, 40), (2, 20))
    ]
    assert shown.locator("#panel0 .read").inner_text() == f"step 10{mean[0]:.4g} a{mean[1]:.4g} {ODD}"
    shown.mouse.move(*point(0.9))
    assert ODD not in shown.locator("#panel0 .read").inner_text()  # it has ended before
    shown.uncheck("[data-run='0']")
    assert shown.locator("#panel0 polyline").count() == 1 and places()[-1] == "20"
    shown.check("[data-run='0']")
    shown.mouse.move(*point(0.5))
    shown.mouse.down()
    shown.mouse.move(*point(0.75), steps=2)
    shown.mouse.up()
    assert places() == ["22", "24", "26", "28", "30"]
    shown.mouse.dblclick(*point(0.5))
    assert places()[-1] == "40" and not said and asked == [page.as_uri()]
    shown.close()
