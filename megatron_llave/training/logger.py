"""The log of a run: one JSON object per step in `log.jsonl`, and a progress line every few steps.

`train` calls `RunLog.step` at the end of each step; the plots and studies read the log with `read_log`.
"""

import errno
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_llave.errors import DataError
from megatron_llave.files import parse_json
from megatron_llave.training.trackers import Tracker, scalars_of

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LINE_WIDTH = 80
"""Largest number of columns of a progress line."""
NOTABLE_WAIT = 0.05
"""Share of an interval that was spent waiting for data, from which the progress line says so."""


def quiet_dependencies() -> None:
    """Silence warnings of megatron-core, torch and Transformer Engine that a user cannot act on.

    Transformer Engine warns about the way in which megatron-core calls its attention. Since its import installs filters
    of its own, call this function after all imports.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\b")
    warnings.filterwarnings("ignore", "Relying on pointer-based detection of packed q/k/v layouts")


@dataclass
class _Interval:
    """Sums over the steps since the last progress line."""

    steps: int = 0
    loss: float = 0.0
    pairs: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass
class _Total:
    """Sums over the steps since the start of this process."""

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0


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
        self._file = None
        self._has_warned = False
        self._interval_sums, self._total = _Interval(), _Total()
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
        scalars = scalars_of(finite)
        with self._survived():
            for tracker in self._trackers:
                tracker.step(record["step"], scalars)
        total, interval = self._total, self._interval_sums
        total.steps += 1
        total.skipped += record["skipped"]
        total.seconds += record["seconds"]
        interval.steps += 1
        interval.loss += record["loss"]
        interval.pairs += record["pairs"]
        interval.seconds += record["seconds"]
        interval.data_seconds += record.get("data_seconds", 0.0)
        is_end = total.steps == 1 or record["step"] == self._total_steps
        if self._interval > 0 and (record["step"] % self._interval == 0 or is_end):
            print(self._progress(record), flush=True)
            self._interval_sums = _Interval()

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
        with self._survived():
            for tracker in self._trackers:
                tracker.step(step, finite)
        if len(finite) == len(scores):
            mean = sum(scores.values()) / len(scores)
            print(f"step {step}: Precision@1 {mean:.1f} %, mean of {len(scores)} sets", flush=True)

    def _begin_again(self) -> None:
        """Write into a new file after somebody has removed the old one, or the whole output directory."""
        file = self._output / LOG_FILE
        logger.warning("%s has been removed; the run continues and begins a new one", file)
        self._output.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._file = file.open("ab", buffering=0)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """Let a full disk cost lines of the log instead of the run."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                reason = error.strerror or error
                logger.warning("log in %s cannot be written: %s; the run continues without it", self._output, reason)
            self._has_warned = True

    def _progress(self, record: dict[str, float | int | str]) -> str:
        """Progress line of at most LINE_WIDTH columns: remaining time at the mean pace, then means of the interval.

        Where it would be wider, the learning rate, then the throughput, and then the wait for data are left out.
        """
        interval, total = self._interval_sums, self._total
        seconds = max(interval.seconds, 1e-9)
        waiting = interval.data_seconds / seconds
        remaining = (self._total_steps - record["step"]) * total.seconds / total.steps
        fields = [
            f"step {record['step']:{len(str(self._total_steps))}d}/{self._total_steps}",
            f"ETA {_duration(remaining)}",
            f"loss {interval.loss / interval.steps:.4g}",
            f"{interval.pairs / seconds:.1f} pairs/s",
            f"lr {record['learning_rate']:.2g}",
            *([f"skipped {total.skipped}"] if total.skipped else []),
            *([f"data wait {waiting:.0%}"] if waiting >= NOTABLE_WAIT else []),
        ]
        for optional in (4, 3, -1):
            if len(" | ".join(fields)) > LINE_WIDTH:
                del fields[optional]
        return " | ".join(fields)

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
    line, end = (json.dumps(record, allow_nan=False) + "\n").encode(), file.seek(0, os.SEEK_END)
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


def _duration(seconds: float) -> str:
    """H:MM:SS, or from a day on the days and hours as `3d 04h`."""
    hours = int(seconds // 3600)
    return str(timedelta(seconds=round(seconds))) if hours < 24 else f"{hours // 24}d {hours % 24:02d}h"


def _is_broken(value: float | int | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
