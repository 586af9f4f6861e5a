"""benchmarks/gather_overhead.py: the rows of its tables are what the loss must have sent and seen; failures end it."""

import os
from pathlib import Path

import pytest

from benchmarks import gather_overhead
from megatron_llave.presets import PRESETS

PAIRS = 4


@pytest.fixture
def printed(openmoji_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the benchmark prints for one and two processes."""
    settings = ["--data", str(openmoji_data), "--pairs", str(PAIRS), "--steps", "1", "--processes", "1", "2"]
    monkeypatch.setattr("sys.argv", ["gather_overhead.py", *settings])
    gather_overhead.main()
    return capsys.readouterr().out


def table(text: str, first_head: str) -> list[list[float]]:
    """The rows of the Markdown table whose first column has this head."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([float(cell) for cell in line.strip("|").split("|")])
    return rows


def test_rows_of_the_tables(printed: str) -> None:
    assert f"{os.cpu_count()} cores" in printed
    assert "random weights" in printed
    rows = table(printed, "processes")
    assert [row[0] for row in rows] == [1, 2]
    width = PRESETS["tiny"]["language"]["hidden_size"]
    both_ways, log_sums, positives, counts = 2 * 4 * PAIRS * width, 2 * 4 * 2 * PAIRS, 4 * PAIRS, 2 * 8
    assert [row[6] for row in rows] == [0, both_ways + log_sums + positives + counts]
    for processes, total, alone, gathered, waiting, moving, _, negatives, effective_alone, effective, hardest in rows:
        assert total == processes * PAIRS
        assert negatives == total - 1
        assert 1 <= effective_alone <= PAIRS - 1
        assert 1 <= effective <= negatives
        assert min(alone, gathered) > 0
        assert (waiting + moving > 0) == (processes > 1)
        assert waiting + moving < 1
        assert 1 / negatives - 0.001 < hardest <= 1  # the largest of the shares, of which there are `negatives`
    assert rows[0][8] == rows[0][9]
    assert rows[1][9] > rows[1][8]
    clusters = {row[0]: row[1:] for row in table(printed, "GPUs")}
    # Four targets of seven other ranks, and their gradients.
    assert clusters[8][0] == pytest.approx(7 * 2 * 4 * 4 * 3584 / 1e6, abs=0.05)
    assert clusters[8][-1] == pytest.approx(7.6e3 * 6 * 7 / 8, abs=1)


def test_a_failing_rank_ends_it_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('last words')")
    monkeypatch.setattr(gather_overhead, "__file__", str(script))
    with pytest.raises(SystemExit, match=r"(?s)last words.*error: 1 processes: exit code 1"):
        gather_overhead.launch(1, [])


def test_a_hanging_rank_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(gather_overhead, "__file__", str(script))
    monkeypatch.setattr(gather_overhead, "TIMEOUT_SECONDS", 2)
    with pytest.raises(SystemExit, match="error: 1 processes: no end after 2 s"):
        gather_overhead.launch(1, [])
