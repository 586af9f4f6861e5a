"""A sample of benchmarks/kill_resume.py: killed runs resume, and their ends are bit-equal; and each way kills."""

from pathlib import Path

import pytest

from benchmarks.kill_resume import kill_and_compare

pytestmark = pytest.mark.long


def test_killed_runs_end_like_an_uninterrupted_one(openmoji_data: Path, tmp_path: Path) -> None:
    counts, faults = kill_and_compare(openmoji_data, tmp_path, "tiny", kills=2, seed=3)
    assert not faults and counts.total() >= 2
