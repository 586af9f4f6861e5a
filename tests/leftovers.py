"""Notices tests that leave files in the clone: all that they write belongs below pytest's tmp_path."""

import os
from pathlib import Path

import pytest

CACHES = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"}
SOURCES = {".py", ".md", ".yaml", ".sh"}

CLOCK = 0.05
"""Seconds that the times of files may be off."""


class Leftovers:
    """Plugin of pytest: compares the files of a clone before and after a session, which fails when there are new ones.

    Somebody may be working on the clone meanwhile: files that were there before may have changed, and a new source file
    in a folder that was there is no test's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: set[Path] = set()
        self.found: list[Path] = []
        self.ran: list[tuple[float, float, str]] = []
        """Start and end of each test, and its name."""

    def pytest_sessionstart(self) -> None:
        self.before = files_below(self.root)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.append((report.start, report.stop, report.nodeid))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        folders = {path.parent for path in self.before}
        new = files_below(self.root) - self.before
        self.found = sorted(path for path in new if not (path.suffix in SOURCES and path.parent in folders))
        if self.found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for path in self.found:
            time = path.lstat().st_mtime
            ran = dict.fromkeys(name for start, end, name in self.ran if start - CLOCK <= time <= end + CLOCK)
            during = ", ".join(ran) or "no test"
            terminalreporter.write_line(
                f"error: {path} is new; tests write below tmp_path alone. Written during: {during}"
            )


def files_below(root: Path) -> set[Path]:
    """All files, and folders without any, but for the caches."""
    found = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in CACHES and not name.endswith(".egg-info")]
        found |= {Path(folder, name) for name in (files or ([] if folders else [""]))}
    return found
