"""Writes the report of an evaluation that consists of tables, such as that of mteb."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmark import Evaluation
from megatron_llave.files import write_json, write_text
from megatron_llave.report.evaluation_report import markdown
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.provenance import about_section, head_line


def write_table_report(title: str, evaluation: Evaluation, about: Mapping[str, Any], directory: str | Path) -> None:
    """Write report.html, report.md and report.json into the folder of the scores.

    Args:
        title: of the report.
        evaluation: its tables, numbers, and what it says about itself.
        about: where the scores come from (provenance.py), by name.
        directory: folder of the scores.

    Raises:
        DataError: a file cannot be written: the disk is full, or a folder has its name.
    """
    directory, about = Path(directory), {**about, **evaluation.about}
    sections = [Section(x.title, x.note, x.columns, x.rows, x.means) for x in evaluation.tables]
    sections.append(about_section(about))
    head = head_line(about)
    try:
        write_json(directory / "report.json", {"evaluation": about, **evaluation.numbers})
        write_text(directory / "report.md", f"# {title}\n\n{head}\n" + "".join(map(markdown, sections)))
        write_text(directory / "report.html", html_page(title, head, sections))
    except OSError as error:
        file = error.filename2 or error.filename or directory
        raise DataError(f"report: {file} cannot be written: {error.strerror or error}") from error
