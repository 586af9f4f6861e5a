"""Detects tests that leave files in the clone. Tests must write only below pytest's tmp_path."""

import os
from pathlib import Path

import pytest

CACHES = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"}
SOURCES = {".py", ".md", ".yaml", ".sh"}

CLOCK = 0.05
"""Tolerance of file times in seconds."""


class Leftovers:
    """A pytest plugin that compares the files of a clone before and after a session; new files fail the session.

    Somebody may be working on the clone at the same time. Changes of existing files are therefore ignored, and so are
    new source files in folders that existed before.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: set[Path] = set()
        self.new: list[Path] = []
        self.ran: list[tuple[float, float, str]] = []
        """Start and end of each test, and its name."""

    def pytest_sessionstart(self) -> None:
        self.before = files_below(self.root)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.append((report.start, report.stop, report.nodeid))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        folders = {path.parent for path in self.before}
        new = files_below(self.root) - self.before
        self.new = sorted(path for path in new if not (path.suffix in SOURCES and path.parent in folders))
        if self.new and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for path in self.new:
            time = path.lstat().st_mtime
            ran = dict.fromkeys(name for start, end, name in self.ran if start - CLOCK <= time <= end + CLOCK)
            during = ", ".join(ran) or "no test"
            terminalreporter.write_line(
                f"error: {path} is new; tests write below tmp_path alone. Written during: {during}"
            )


def files_below(root: Path) -> set[Path]:
    """All files and all empty folders below a folder, except caches."""
    paths = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in CACHES and not name.endswith(".egg-info")]
        paths |= {Path(folder, name) for name in (files or ([] if folders else [""]))}
    return paths
