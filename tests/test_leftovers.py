"""A test that writes into the clone fails the session, and is named; caches and what was there before do not."""

from pathlib import Path

import pytest
from leftovers import Leftovers, files_below

pytest_plugins = ["pytester"]


@pytest.fixture
def clone(pytester: pytest.Pytester) -> Path:
    """A clone with two tests, of which the second leaves a file where runs/ has one already."""
    pytester.makeconftest("")
    pytester.makepyfile(
        """
        from pathlib import Path
        def test_clean(tmp_path): (tmp_path / "file").touch()
        def test_dirty(): Path(__file__).with_name("runs").joinpath("tiny", "log.jsonl").touch()
        """
    )
    for name in ("runs/tiny/state.json", "__pycache__/x.pyc", ".git/index"):
        (pytester.path / name).parent.mkdir(parents=True, exist_ok=True)
        (pytester.path / name).touch()
    return pytester.path


def test_what_a_test_leaves_fails_the_session_and_names_it(pytester: pytest.Pytester, clone: Path) -> None:
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", plugins=[Leftovers(clone)])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"error: {clone}/runs/tiny/log.jsonl is new; *during: *::test_dirty*"])


def test_nothing_left_is_nothing_said(pytester: pytest.Pytester, clone: Path) -> None:
    (clone / "runs/tiny/log.jsonl").touch()
    pytester.makepyfile(test_writes="from pathlib import Path\ndef test(): Path(__file__).with_name('x.py').touch()")
    looks = Leftovers(clone)
    assert pytester.inline_run("-p", "no:cacheprovider", plugins=[looks]).ret == pytest.ExitCode.OK
    assert looks.new == []


def test_files_of_caches_do_not_count(clone: Path) -> None:
    (clone / "runs/empty").mkdir()
    names = {str(path.relative_to(clone)) for path in files_below(clone)}
    assert {"runs/tiny/state.json", "runs/empty"} <= names and not any(
        "pycache" in name or ".git" in name for name in names
    )
