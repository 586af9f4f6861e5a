"""The log of a run: one JSON object per step in `log.jsonl`, and every few steps a progress line (progress.py).

`train` calls `RunLog.step` at the end of each step; the plots and studies read the log with `read_log`.
"""

import errno
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron_llave.errors import DataError, UserError
from megatron_llave.files import parse_json
from megatron_llave.training.progress import (
    Interval,
    Total,
    columns,
    duration,
    long_line,
    short_line,
    show,
    time_of_day,
)
from megatron_llave.training.tracked_values import histograms_of, scalars_of
from megatron_llave.training.trackers import Tracker

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
PROGRESS_FILE = "progress.log"
"""File in the output directory with the long form of the progress lines."""
MONTAGE_FOLDER = "montages"
"""Folder in the output directory with images of the evaluations."""


def quiet_dependencies() -> None:
    """Silence warnings of megatron-core, torch and Transformer Engine that a user cannot act on.

    Transformer Engine warns about the way in which megatron-core calls its attention. Since its import installs filters
    of its own, call this function after all imports.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\b")
    warnings.filterwarnings("ignore", "Relying on pointer-based detection of packed q/k/v layouts")


class RunLog:
    """Writes the log of a run; does nothing on ranks where it is not enabled."""

    def __init__(
        self, output: Path, interval: int, total_steps: int, enabled: bool, trackers: Sequence[Tracker] = ()
    ) -> None:
        """Open `output`/log.jsonl for appending.

        Args:
            output: output directory of the run, created if it does not exist.
            interval: steps between progress lines; 0: no progress lines.
            total_steps: steps of the whole run, for the remaining time.
            enabled: True on the one rank that logs.
            trackers: further destinations of the metrics.
        """
        self._output, self._trackers = Path(output), trackers
        self._interval, self._total_steps = interval, total_steps
        self._file, self._step = None, 0
        self._warned: set[str] = set()
        self._interval_sums, self._total = Interval(), Total()
        self._console = Console(highlight=False)
        if enabled:
            Path(output).mkdir(parents=True, exist_ok=True)
            path = Path(output) / LOG_FILE
            _remove_partial_line(path)
            self._file = path.open("ab", buffering=0)

    def step(self, record: dict[str, float | int | str]) -> None:
        """Append the record of a step; print a progress line at the end of an interval and after the first step.

        Args:
            record: from `metrics.collect`. A number that is not finite is written as null, because JSON has none.
        """
        if self._file is None:
            return
        finite = {key: None if _is_broken(value) else value for key, value in record.items()}
        with self._survived():
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._begin_again()
            _append_line(self._file, finite)
        self._step = record["step"]
        values = scalars_of(finite), histograms_of(finite)
        for tracker in self._trackers:
            tracker.step(record["step"], *values)
        self._total.add(record)
        self._interval_sums.add(record)
        is_end = self._total.steps == 1 or record["step"] == self._total_steps
        if self._interval > 0 and (record["step"] % self._interval == 0 or is_end):
            how = record, self._total_steps, self._interval_sums, self._total
            self._tell(short_line(*how, columns(self._console)), long_line(*how))
            self._interval_sums = Interval()

    def evaluation(self, step: int, scores: Mapping[str, float], seconds: float, candidates: Mapping[str, int]) -> None:
        """Append the scores of an evaluation to evaluations.jsonl, and print their mean.

        Args:
            step: steps done before the evaluation.
            scores: set -> Precision@1 in percent, for at least one set; NaN, written as null, for a set without score.
            seconds: duration of the evaluation.
            candidates: set -> number of its different candidates.
        """
        if self._file is None:
            return
        written = {name: None if _is_broken(value) else value for name, value in scores.items()}
        record = {"step": step, "precision_at_1": written, "seconds": seconds, "candidates": dict(candidates)}
        with self._survived(), (self._output / EVALUATIONS_FILE).open("ab", buffering=0) as file:
            _append_line(file, record)
        finite = {f"precision_at_1/{name}": value for name, value in written.items() if value is not None}
        for tracker in self._trackers:
            tracker.step(step, finite, {})
        if len(finite) == len(scores):
            mean = sum(scores.values()) / len(scores)
            line = f"step {step}: Precision@1 {mean:.1f} %, mean of {len(scores)} sets"
            each = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
            self._tell(Text(line), f"{time_of_day()} {line} in {duration(seconds)}: {each}")

    def montage(self, draw: Callable[[Path], None]) -> None:
        """Let `draw` write an image of an evaluation after the last step, and pass it on to the trackers."""
        folder = self._output / MONTAGE_FOLDER
        path = folder / f"step-{self._step:07d}.png"
        with self._survived(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            draw(path)
            with Image.open(path) as image:
                image.load()
                for tracker in self._trackers:
                    tracker.image(self._step, "evaluation/montage", image)

    @property
    def is_enabled(self) -> bool:
        """Whether this rank writes the log."""
        return self._file is not None

    def _tell(self, short: Text, long: str) -> None:
        """Write a line to standard output, and its long form into the text log."""
        with self._survived(), (self._output / PROGRESS_FILE).open("ab", buffering=0) as file:
            _append(file, f"{long}\n".encode())
        with self._survived("standard output"):
            show(self._console, short)

    def _begin_again(self) -> None:
        """Write into a new file after somebody has removed the old one, or the whole output directory."""
        file = self._output / LOG_FILE
        logger.warning("%s has been removed; the run continues and begins a new one", file)
        self._output.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._file = file.open("ab", buffering=0)

    @contextmanager
    def _survived(self, what: str = "") -> Iterator[None]:
        """Let a full disk, a closed pipe or a damaged image cost the log, or what is named, instead of the run."""
        what = what or f"log in {self._output}"
        try:
            yield
        except (OSError, UserError) as error:
            if what not in self._warned:
                self._warned.add(what)
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s cannot be written: %s; the run continues without it", what, reason)

    def close(self) -> None:
        """Close the file and the trackers."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = ()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: str | Path) -> list[dict[str, float | int | str | None]]:
    """Read the records of a log in the order of their steps; a number that was not finite is None.

    A resumed run has repeated the steps after its checkpoint, of which the later record counts. The last line of a
    killed run may be incomplete.

    Raises:
        DataError: the file does not exist, or a line other than the last is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"log {path} does not exist; training writes one into train.output")
    records: list[dict[str, float | int | str | None]] = []
    lines = path.read_bytes().split(b"\n")
    # The text after the last line end is empty or an incomplete record.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = parse_json(line, str(path))
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is not a step's record; delete that line") from error
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    return records


def _append_line(file: FileIO, record: Mapping[str, Any]) -> None:
    """Write a complete line or nothing: a disk may become full in the middle of a line.

    Raises:
        OSError: the line cannot be written.
    """
    _append(file, (json.dumps(record, allow_nan=False) + "\n").encode())


def _append(file: FileIO, line: bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    if file.write(line) < len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _remove_partial_line(path: Path) -> None:
    """Remove the incomplete last line of a killed run, so that the next record starts on a new line."""
    if path.is_file():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)


def _is_broken(value: float | int | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
