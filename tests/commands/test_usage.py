"""A wrong argument ends every tool with status 2 and one line."""

from pathlib import Path

import pytest
from forking import ROOT, run_script

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS)
def test_unknown_option_is_one_line(tool: str) -> None:
    done = run_script(ROOT / "tools" / tool, "--no-such-option")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_wrong_value_of_a_command_is_one_line(tmp_path: Path) -> None:
    done = run_script(ROOT / "tools" / "evaluate.py", "prepared", "--checkpoint", tmp_path, "--ties", "maybe")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--ties: invalid choice: 'maybe'" in done.stderr and "strict" in done.stderr


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (
            "preflight.py",
            ("--config", ROOT / "examples/tiny.yaml", "--megabytes"),
            "must be at least 1 and at most 100000",
        ),
        ("prepare_data.py", ("tokenizer", "--source", "text", "--out", "out.model", "--vocabulary"), "at most 1000000"),
        ("prepare_data.py", ("verify", "folder", "--workers"), "must be at most 1024"),
    ],
)
def test_a_number_too_large_is_one_line(tmp_path: Path, tool: str, arguments: tuple, message: str) -> None:
    (tmp_path / "text").write_text("a text")
    done = run_script(ROOT / "tools" / tool, *arguments, 10**20)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
