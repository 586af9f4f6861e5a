"""The report: means, tables, files, and what the pictures show, read from their pixels."""

import base64
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from megatron_llave.batch import Side
from megatron_llave.errors import DataError
from megatron_llave.evaluation.task import SetResult
from megatron_llave.loss.similarities import overlap_coefficient
from megatron_llave.options.evaluate import TIES
from megatron_llave.report import evaluation_report, montage, plots

GREEN, RED = (0, 158, 115), (213, 94, 0)


def set_result(name="names", meta_task="retrieval", split="ind", precision=50.0, top=((0, 1), (0, 1)), **given):
    """A set of two queries q0, q1 with right candidates c0, c1."""
    values = {
        "chance": 100 / 3,
        "num_queries": 2,
        "num_candidates": 3,
        "overlap": 0.25,
        "margin": 0.2,
        "auc": 0.75,
        "alignment": 0.6,
        "uniformity": -2.0,
        "hub_share": 50.0,
        "num_ties": 0,
        "positive": [0.9, 0.5],
        "hardest_negative": [0.4, 0.6],
        "top": [list(row) for row in top],
        "positives": [0, 1],
        "queries": ["q0", "q1"],
        "candidates": ["c0", "c1", "c2"],
    }
    return SetResult(name=name, meta_task=meta_task, split=split, precision_at_1=precision, **(values | given))


def image_file(colour: str, size: tuple[int, int] = (56, 56)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


INPUTS = {
    "q0": Side("Find the colour.", [image_file("navy")]),
    "q1": Side("Find the colour. " + "A long explanation. " * 40, [image_file("navy", (300, 40))]),
    "c0": Side("Represent the given image.", [image_file("cyan")]),
    "c1": Side("Represent the given image.", [image_file("magenta", (9, 70))]),
    "c2": Side("Represent the given image.", [image_file("yellow")]),
}
MIXED = [
    set_result("a", "classification", "ind", 40.0),
    set_result("b", "classification", "ood", 10.0),
    set_result("c", "retrieval", "ind", 60.0),
    set_result("d", "retrieval", "seen", 99.0),
]


def log_records(steps: int = 60) -> list[dict]:
    return [
        {
            "step": step,
            "subset": ("i2t", "t2i")[step % 2],
            "loss": 3.0 / step,
            "learning_rate": 1e-3,
            "temperature": 0.05,
            "alpha": 9.0,
            "positive_similarity": 0.6,
            "hardest_negative_similarity": 0.4,
        }
        for step in range(1, steps + 1)
    ]


def pixels(path) -> np.ndarray:
    """[height, width, 3] of a PNG, checked to be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """[height, width] bool: pixels of exactly this colour."""
    return (image == colour).all(axis=2)


def test_means_are_per_set_and_leave_out_the_seen_ones():
    assert evaluation_report.summarise(MIXED) == {
        "meta_tasks": {"classification": 25.0, "retrieval": 60.0},
        "ind": 50.0,
        "ood": 10.0,
        "held_out": pytest.approx(110 / 3),
    }
    assert evaluation_report.summarise([]) == {"meta_tasks": {}, "ind": None, "ood": None, "held_out": None}
    assert evaluation_report.summarise(MIXED[3:]) == evaluation_report.summarise([])


def markdown_table(results):
    """The scores as report.md has them, without the title and the note above them."""
    return evaluation_report.markdown(evaluation_report.scores_section(results, "first")).rpartition("\n\n")[2]


def test_markdown_table():
    lines = markdown_table(MIXED).splitlines()
    assert (
        lines[0] == "| data set | Precision@1 | before training | chance | meta-task | split | queries | candidates |"
    )
    assert lines[1].count("|") == lines[0].count("|")
    assert lines[2] == "| a | 40.0 | - | 33.3 | classification | ind | 2 | 3 |"
    assert lines[5] == "| d | 99.0 | - | 33.3 | retrieval | seen | 2 | 3 |"
    means = {line.split("|")[1].strip(" *"): line.split("|")[2].strip(" *") for line in lines[6:]}
    assert means == {
        "mean classification": "25.0",
        "mean retrieval": "60.0",
        "mean IND": "50.0",
        "mean OOD": "10.0",
        "mean of all held-out sets": "36.7",
    }
    assert r"| a\|b |" in markdown_table([set_result("a|b")])
    assert len(markdown_table([]).splitlines()) == 2


def test_scores_before_training_stand_beside_the_scores(tmp_path, capsys):
    before = dict(zip("abcd", (11.0, 10.5, None, 1.0)))
    results = [replace(result, before_training=before[result.name]) for result in MIXED]
    lines = markdown_table(results).splitlines()
    assert lines[2].startswith("| a | 40.0 | 11.0 | 33.3 |") and lines[4].startswith("| c | 60.0 | - | 33.3 |")
    means = {line.split("|")[1].strip(" *"): line.split("|")[3].strip(" *") for line in lines[6:]}
    assert (means["mean classification"], means["mean OOD"]) == ("10.8", "10.5")
    # A mean over other sets than those of the column beside it would mislead.
    assert means["mean retrieval"] == means["mean IND"] == means["mean of all held-out sets"] == "-"
    evaluation_report.print_table(results, "strict")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("before training", "11.0", "10.8"))
    evaluation_report.write_numbers(results, tmp_path / "report.json", {})
    value = json.loads((tmp_path / "report.json").read_text())
    assert [scored["before_training"] for scored in value["sets"]] == list(before.values())
    assert value["means_before_training"]["meta_tasks"] == {"classification": 10.75, "retrieval": None}
    note = evaluation_report.scores_section(results, "first").about
    assert "--before" not in note and "--before" in evaluation_report.scores_section(MIXED, "first").about


def test_terminal_table_is_not_cut_in_a_log_file(capsys):
    name = "a_rather_long_name_of_a_set[1]"
    evaluation_report.print_table([set_result(name, precision=12.34), *MIXED], "strict")
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if name in line)
    assert "12.3" in row and "retrieval" in row
    assert "mean of all held-out sets" in out and "ties: strict" in out


def test_json_has_the_numbers_but_not_the_long_lists(tmp_path):
    evaluation_report.write_numbers(MIXED, tmp_path / "report.json", {"checkpoint": "step 7"})
    value = json.loads((tmp_path / "report.json").read_text())
    assert value["checkpoint"] == "step 7" and value["means"] == evaluation_report.summarise(MIXED)
    assert [scored["name"] for scored in value["sets"]] == ["a", "b", "c", "d"]
    first = value["sets"][0]
    counts = [first.pop(f"{name}_histogram") for name in ("positive", "hardest_negative")]
    # Cosines 0.9 and 0.5, 0.4 and 0.6: bin k begins at -1 + k / 25.
    assert [{place: n for place, n in enumerate(histogram) if n} for histogram in counts] == [
        {47: 1, 37: 1},
        {35: 1, 40: 1},
    ]
    assert first == {
        "name": "a",
        "meta_task": "classification",
        "split": "ind",
        "precision_at_1": 40.0,
        "chance": 100 / 3,
        "num_queries": 2,
        "num_candidates": 3,
        "overlap": 0.25,
        "margin": 0.2,
        "auc": 0.75,
        "alignment": 0.6,
        "uniformity": -2.0,
        "hub_share": 50.0,
        "num_ties": 0,
        "before_training": None,
    }


def test_failed_write_leaves_the_old_file(tmp_path):
    evaluation_report.write_numbers(MIXED, tmp_path / "report.json", {})
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(TypeError):
        evaluation_report.write_numbers(MIXED, tmp_path / "report.json", {"broken": object()})
    assert (tmp_path / "report.json").read_text() == before


@pytest.mark.parametrize("name", ["report.html", "report.json", "scores.png", "montage.png", "report.md"])
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"report: {tmp_path}/{name} cannot be written: Is a directory"):
        evaluation_report.write_report(MIXED, "first", [], INPUTS, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_drawn_histogram_has_the_bins_of_the_overlap(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda self, x, bins, **kwargs: drawn.append((x, bins, kwargs)))
    numbers = np.random.default_rng(0).normal(size=(2, 300)) * 0.1 + [[0.3], [0.2]]
    result = set_result(positive=numbers[0].tolist(), hardest_negative=numbers[1].tolist())
    evaluation_report.plot_similarities([result], tmp_path / "a.png")
    shares = [np.histogram(x, edges)[0] / len(x) for x, edges, _ in drawn]
    overlap = overlap_coefficient(*map(torch.from_numpy, numbers))
    assert np.minimum(*shares).sum() == pytest.approx(overlap, abs=1e-6)


def test_report_writes_all_files(tmp_path):
    evaluation_report.write_report(MIXED, "first", log_records(), INPUTS, tmp_path / "new" / "report")
    pictures = {"scores.png", "loss.png", "similarities.png", "montage.png", "mistakes.png"}
    names = {"report.json", "report.md", "report.html", *pictures}
    assert {path.name for path in (tmp_path / "new" / "report").iterdir()} == names
    text = (tmp_path / "new" / "report" / "report.md").read_text()
    assert markdown_table(MIXED) in text
    for name in pictures:
        assert f"]({name})" in text
        with Image.open(tmp_path / "new" / "report" / name) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 20
    assert json.loads((tmp_path / "new" / "report" / "report.json").read_text())["steps"] == 60


def test_report_without_records_speaks_of_no_training(tmp_path):
    evaluation_report.write_report(MIXED[:1], "strict", [], INPUTS, tmp_path)
    pictures = {"scores.png", "similarities.png", "montage.png", "mistakes.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html", *pictures}
    assert "loss.png" not in (tmp_path / "report.md").read_text()


class Page(HTMLParser):
    """What a browser would show: the cells of tables row by row, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[bytes] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag == "img":
            head, data = given["src"].split(",")
            assert head == "data:image/png;base64"
            self.pictures.append(base64.b64decode(data))
        self.links += [given[name] for name in ("href", "src") if not str(given.get(name, "data:")).startswith("data:")]

    def handle_data(self, data: str) -> None:
        if self.rows and self.lasttag in ("td", "th") and data.strip():
            self.rows[-1].append(data)


def test_html_report_holds_everything_and_fetches_nothing(tmp_path):
    named = [set_result('<b>&"', "vqa", "ind", 12.5, num_ties=7), *MIXED]
    paper = {"classification": 57.4, "grounding": 82.9, "overall": 59.1}
    about = {"step": 7, "date": "<today>"}
    evaluation_report.write_report(named, "first", log_records(), INPUTS, tmp_path, paper, about, {"work": 3})
    page = Page((tmp_path / "report.html").read_text())
    assert page.links == []
    assert ['<b>&"', "12.5", "-", "33.3", "vqa", "ind", "2", "3"] in page.rows
    assert ["mean classification", "25.0", "-"] in page.rows and ["mean of all held-out sets", "30.6", "-"] in page.rows
    assert ["classification", "25.0", "57.4"] in page.rows and ["grounding", "-", "82.9"] in page.rows
    assert ['<b>&"', "0.700", "0.500", "0.200", "0.75", "0.25", "0.600", "-2.00", "50.0", "7"] in page.rows
    files = ("scores.png", "similarities.png", "montage.png", "mistakes.png", "loss.png")
    assert page.pictures == [(tmp_path / name).read_bytes() for name in files]
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["ties"], written["work"], written["paper"]) == ("first", 3, paper)
    assert written["evaluation"] == about and ["date", "<today>"] in page.rows
    assert "5 evaluation sets, step 7, date <today>" in (tmp_path / "report.md").read_text()
    assert "prefers-color-scheme: dark" in (tmp_path / "report.html").read_text()
    assert "| grounding | - | 82.9 |" in (tmp_path / "report.md").read_text()
    for name in ("report.html", "report.md"):
        assert f"Ties: first. {TIES['first']}" in (tmp_path / name).read_text()


def test_worst_mistakes_come_first_and_right_queries_never():
    result = set_result(
        positive=[0.5, 0.5, 0.5, 0.9],
        hardest_negative=[0.6, 0.9, 0.7, 0.1],
        top=[[1, 0], [2, 0], [1, 2], [0, 1]],
        positives=[0, 0, 0, 0],
        queries=["q0", "q1", "q0", "q1"],
    )
    [panel] = evaluation_report.mistake_panels([result], INPUTS, per_set=2, k=2)
    assert panel.headings == ("1", "right")
    assert [row.candidates for row in panel.rows] == [
        [(INPUTS["c2"], False), (INPUTS["c0"], True)],
        [(INPUTS["c1"], False), (INPUTS["c0"], True)],
    ]
    several = replace(result, further=[[], [2], [1, 2], []])
    [panel] = evaluation_report.example_panels([several], INPUTS, per_set=4, k=2)
    assert [[is_right for _, is_right in row.candidates] for row in panel.rows] == [
        [False, True],
        [True, True],
        [True, True],
        [True, False],
    ]
    padded = evaluation_report.mistake_panels([result], INPUTS, per_set=9)[0].rows
    assert len(padded) == 3 and padded[0].candidates[2:] == [None, None, (INPUTS["c0"], True)]
    assert evaluation_report.mistake_panels([set_result(hardest_negative=[0.1, -math.inf])], INPUTS) == []


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_loss_curve_falls_and_each_subset_has_its_colour(tmp_path):
    plots.plot_loss(log_records(), tmp_path / "loss.png")
    image = pixels(tmp_path / "loss.png")
    height, width = image.shape[:2]
    for colour in plots.SUBSET_COLOURS[:2]:
        # Below the legend; the loss panel takes the upper half.
        rows, columns = np.nonzero(has(image, rgb(colour))[80 : height // 2])
        assert columns.max() - columns.min() > 0.8 * width
        # The vertical axis of pictures points down.
        assert rows[columns < width * 0.15].mean() < rows[columns > width * 0.85].mean() - 50
    assert not has(image, rgb(plots.SUBSET_COLOURS[2])).any()


@pytest.mark.parametrize("records", [[], log_records(1), log_records(3)])
def test_loss_plot_of_a_run_that_has_hardly_begun(records, tmp_path):
    plots.plot_loss(records, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png").std() > 1


def test_loss_plot_leaves_out_what_was_not_finite(tmp_path):
    records = log_records()
    records[10]["loss"] = None
    records[20] |= {"positive_similarity": None, "loss": float("inf")}
    plots.plot_loss(records, tmp_path / "loss.png")
    assert has(pixels(tmp_path / "loss.png"), rgb(plots.SUBSET_COLOURS[1])).sum() > 500


def test_running_mean_spans_the_neighbours():
    axes = Figure().add_subplot()
    values = np.arange(400.0)
    values[200] = math.nan
    plots._dots_and_mean(axes, np.arange(400.0), values, plots.BLUE, "x", "-")
    x, y = axes.lines[0].get_data()
    assert 200 not in x and len(x) == 399
    assert y[100] == pytest.approx(100)  # symmetric around the step
    assert y[0] == pytest.approx(np.mean(values[: 399 // 40 + 1]))


def test_similarity_panels_show_both_samples(tmp_path):
    apart = set_result(positive=[0.9] * 20, hardest_negative=[0.1] * 20)
    evaluation_report.plot_similarities([apart], tmp_path / "one.png")
    image = pixels(tmp_path / "one.png")[80:]  # below the legend
    _, positive = np.nonzero(has(image, rgb(plots.BLUE)))
    _, negative = np.nonzero(has(image, rgb(plots.ORANGE)))
    tall = [np.bincount(columns).argmax() for columns in (negative, positive)]
    assert tall[0] < image.shape[1] / 2 < tall[1]
    evaluation_report.plot_similarities([apart] * 5, tmp_path / "five.png")
    assert pixels(tmp_path / "five.png").shape[0] > 1.5 * pixels(tmp_path / "one.png").shape[0]


def test_similarity_panels_bear_empty_and_infinite_samples(tmp_path):
    alone = set_result(hardest_negative=[-math.inf, -math.inf])
    evaluation_report.plot_similarities([alone], tmp_path / "alone.png")
    assert has(pixels(tmp_path / "alone.png"), rgb(plots.BLUE)).any()
    evaluation_report.plot_similarities([], tmp_path / "none.png")
    assert pixels(tmp_path / "none.png").shape[0] > 10


def frames(image: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) drawn in a colour below the legend, in the order of rows."""
    mask = has(image, colour)
    mask[: montage.LEGEND_HEIGHT] = False
    boxes = []
    rows = np.flatnonzero(mask.any(axis=1))
    for block in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []:
        columns = np.flatnonzero(mask[block].any(axis=0))
        boxes.append((int(columns[0]), int(block[0]), int(columns[-1]), int(block[-1])))
    return boxes


def draw(results, inputs, path, per_set: int = 3, k: int = 5) -> None:
    montage.draw_montage(evaluation_report.example_panels(results, inputs, per_set, k), path)


def test_montage_frames_the_right_candidate_green_and_a_wrong_best_one_red(tmp_path):
    # First query: right at once. Second: c2 is best but wrong, the right c1 is third.
    result = set_result(top=[[0, 1, 2], [2, 0, 1]])
    draw([result], INPUTS, tmp_path / "montage.png")
    image = pixels(tmp_path / "montage.png")
    (first, third), (wrong,) = frames(image, GREEN), frames(image, RED)
    assert first[0] == wrong[0] and first[1] < wrong[1]  # both at rank 1, one row below the other
    assert third[1] == wrong[1]
    assert third[0] - wrong[0] == 2 * (montage.CELL + montage.GAP)
    for left, top, right, bottom in (first, third, wrong):
        assert right - left == bottom - top == montage.CELL
    for (left, top, right, bottom), colour in ((first, "cyan"), (third, "magenta"), (wrong, "yellow")):
        centre = image[(top + bottom) // 2, (left + right) // 2]
        assert tuple(centre) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert has(image, (0, 0, 128)).sum() > 5000  # the queries' pictures


def test_montage_shows_no_more_than_asked_for(tmp_path):
    many = set_result(top=[[0, 1, 2]] * 90, positives=[0] * 90, queries=["q0"] * 90)
    draw([many], INPUTS, tmp_path / "montage.png", per_set=4, k=2)
    image = pixels(tmp_path / "montage.png")
    assert len(frames(image, GREEN)) == 4
    assert has(image, (255, 0, 255)).any() and not has(image, (255, 255, 0)).any()  # c2 has rank 3


def test_montage_spreads_its_queries_over_the_set(tmp_path):
    # Only queries 0, 30 and 60 of 90 are right: the three that are shown.
    top = [[0] if number % 30 == 0 else [1] for number in range(90)]
    result = set_result(top=top, positives=[0] * 90, queries=["q0"] * 90)
    draw([result], INPUTS, tmp_path / "montage.png")
    image = pixels(tmp_path / "montage.png")
    assert len(frames(image, GREEN)) == 3 and not frames(image, RED)


def test_montage_of_texts_and_of_missing_candidates(tmp_path):
    inputs = INPUTS | {"c0": Side("x" * 300, []), "c1": Side("cat", []), "c2": Side("dog", [])}
    result = set_result(top=[[1, -1, -1], [1, 0, -1]])
    draw([result], inputs, tmp_path / "montage.png")
    image = pixels(tmp_path / "montage.png")
    (wrong,), (right,) = frames(image, RED), frames(image, GREEN)
    assert wrong[0] == right[0]
    # Nothing is drawn for the missing second candidate of the first query.
    step = montage.CELL + montage.GAP
    assert (image[wrong[1] : wrong[3], wrong[0] + step : wrong[2] + step] == 255).all()
    # The text inside a frame is dark on pale, and stays inside.
    inside = image[right[1] + 10 : right[3] - 10, right[0] + 10 : right[2] - 10]
    assert inside.min() < 90
    cell = image[right[1] : right[3], right[0] + step : right[2] + step]
    assert cell.min() < 90 and (cell[:, -3:] > 200).all()


def test_montage_lays_sets_out_in_two_columns_in_order(tmp_path):
    right, wrong = set_result(top=[[0], [1]]), set_result(top=[[2], [2]])
    draw([right, wrong, right], INPUTS, tmp_path / "three.png")
    draw([right], INPUTS, tmp_path / "one.png")
    three, single = pixels(tmp_path / "three.png"), pixels(tmp_path / "one.png")
    assert three.shape[1] > 1.9 * single.shape[1] and three.shape[0] < 2 * single.shape[0]
    left, right_half = np.split(three, [three.shape[1] // 2], axis=1)
    # The second set is below the first, the third beside it.
    assert frames(left, RED)[0][1] > frames(left, GREEN)[-1][1]
    assert frames(right_half, GREEN) and not frames(right_half, RED)
    draw([], {}, tmp_path / "none.png")
    assert pixels(tmp_path / "none.png").shape[1] > 100


def test_wrapped_lines_fit_and_lose_no_letter():
    font = ImageFont.load_default(14)
    text = "a short text with one Donaudampfschifffahrtsgesellschaftskapitaen in it"
    lines = montage.wrap_text(text, font, 90)
    assert all(font.getlength(line) <= 90 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert montage.wrap_text("", font, 90) == []
    assert montage.wrap_text("two words", font, 400) == ["two words"]
