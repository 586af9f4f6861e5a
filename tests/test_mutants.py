"""Damaged files of every kind that users bring: each is read or refused in one line, and delivers no other content."""

from pathlib import Path

import pytest
from mutants import OK, READERS, run

COUNTS = {"hf": 6, "checkpoint": 6}
"""Readers that load a model, and so take longer."""


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(groups, tmp_path: Path, name: str) -> None:
    lines: list[str] = []
    results = run(name, COUNTS.get(name, 40), tmp_path, seed=1, say=lines.append)
    assert set(results) <= set(OK), "\n".join(lines)
    assert results["refused"] > 0 or name == "shards", "a damaged shard costs pairs and never the run"
