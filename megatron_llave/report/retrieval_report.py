"""Writes the report of a retrieval: its scores beside chance, and some queries with images of their best candidates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmark import Evaluation
from megatron_llave.files import write_text
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.montage import Panel, Row, draw_montage
from megatron_llave.report.provenance import about_section, head_line

FIGURE, PAGE = "montage.png", "report.html"
CHANCE_NOTE = "In percent. Chance is the expected score of a random order of the candidates."


def write_retrieval_report(evaluation: Evaluation, about: Mapping[str, Any], directory: str | Path) -> None:
    """Write report.html and montage.png into the folder of the scores.

    Args:
        evaluation: the scores and examples.
        about: where the scores come from (provenance.py), by name.
        directory: folder of the scores.

    Raises:
        DataError: a file cannot be written: the disk is full, or a folder has its name.
    """
    figure = Path(directory) / FIGURE
    shown = max(len(candidates) for _, candidates in evaluation.examples)
    rows = [Row(query, [*found, *[None] * (shown - len(found))]) for query, found in evaluation.examples]
    try:
        draw_montage([Panel("Examples", "", rows, tuple(map(str, range(1, shown + 1))))], figure)
        scores = Section("Scores", CHANCE_NOTE, ("score", "here", "chance"), evaluation.rows)
        page = html_page(
            "Retrieval", head_line(about), [scores, Section("Examples", figures=[figure]), about_section(about)]
        )
        write_text(Path(directory) / PAGE, page)
    except OSError as error:
        file = error.filename2 or error.filename or directory
        raise DataError(f"report: {file} cannot be written: {error.strerror or error}") from error
