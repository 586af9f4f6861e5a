"""The record of a run: one JSON object per step in `log.jsonl`, and a progress line now and then.

`train` calls `RunLog.step` at the end of each step; `report` plots what `read_log` reads.
"""

import errno
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_llave.errors import DataError
from megatron_llave.training.trackers import Sink

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


def quiet_dependencies() -> None:
    """Silence what megatron-core and torch say about their own internals; whoever trains can do nothing about it."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\b")


class RunLog:
    """Writes the log of a run; does nothing on ranks that are told not to."""

    def __init__(
        self, output: Path, interval: int, total_steps: int, enabled: bool, sinks: Sequence[Sink] = ()
    ) -> None:
        """Open `output`/log.jsonl for appending.

        Args:
            output: folder of the run, made if missing.
            interval: steps between progress lines; 0: none.
            total_steps: steps of the whole run, for the time left.
            enabled: True on the one rank that logs.
            sinks: where the numbers go besides.
        """
        self._output, self._sinks = Path(output), sinks
        self._interval, self._total_steps = interval, total_steps
        self._file = None
        self._has_warned = False
        self._pairs = self._tokens = 0
        self._seconds = self._waited = 0.0  # these four since the last progress line, the next three since the start
        self._all_steps = self._skipped = 0
        self._all_seconds = 0.0
        if enabled:
            Path(output).mkdir(parents=True, exist_ok=True)
            path = Path(output) / LOG_FILE
            _cut_half_line(path)
            self._file = path.open("ab", buffering=0)

    def step(self, record: dict[str, float | int | str]) -> None:
        """Append one step's record and print progress when the interval is over.

        Args:
            record: step (from 1), subset, loss, learning_rate, gradient_norm, temperature, alpha, seconds, what
                metrics.py adds, and now and then its histograms, all of this step alone.
                A number that is not finite is written as null, since JSON has no word for it.
        """
        if self._file is None:
            return
        finite = {key: None if _is_broken(value) else value for key, value in record.items()}
        with self._survived():
            _append_line(self._file, finite)
        numbers = {key: value for key, value in finite.items() if isinstance(value, (int, float)) and key != "step"}
        with self._survived():
            for sink in self._sinks:
                sink.step(record["step"], numbers)
        self._all_steps += 1
        self._pairs += record["pairs"]
        self._tokens += record["tokens"]
        self._seconds += record["seconds"]
        self._waited += record.get("data_seconds", 0.0)
        self._all_seconds += record["seconds"]
        self._skipped += record["skipped"]
        is_last = record["step"] == self._total_steps
        if self._interval > 0 and (record["step"] % self._interval == 0 or is_last):
            print(self._progress(record), flush=True)
            self._pairs = self._tokens = 0
            self._seconds = self._waited = 0.0

    def evaluation(self, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Append what an evaluation after `step` steps gave to evaluations.jsonl, and print the mean.

        Args:
            step: steps done.
            scores: Precision@1 in percent by set, at least one; NaN, written as null, where there is none.
            seconds: that it took.
        """
        if self._file is None:
            return
        written = {name: None if _is_broken(value) else value for name, value in scores.items()}
        record = {"step": step, "precision_at_1": written, "seconds": seconds}
        with self._survived(), (self._output / EVALUATIONS_FILE).open("ab", buffering=0) as file:
            _append_line(file, record)
        finite = {f"precision_at_1/{name}": value for name, value in written.items() if value is not None}
        with self._survived():
            for sink in self._sinks:
                sink.step(step, finite)
        if len(finite) == len(scores):
            mean = sum(scores.values()) / len(scores)
            print(f"step {step}: Precision@1 {mean:.1f} %, mean of {len(scores)} sets", flush=True)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """A full disk costs lines of the log, not the run."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                logger.warning("log in %s cannot be written: %s; the run goes on without", self._output, error.strerror)
            self._has_warned = True

    def _progress(self, record: dict[str, float | int | str]) -> str:
        """One line: the numbers of this step, rates over the interval, time left at the mean pace of this process."""
        seconds = max(self._seconds, 1e-9)
        left = (self._total_steps - record["step"]) * self._all_seconds / self._all_steps
        width = len(str(self._total_steps))
        return " | ".join(
            [
                f"step {record['step']:{width}d}/{self._total_steps}",
                f"{record['subset']:<12}",
                f"loss {record['loss']:7.4f}",
                f"lr {record['learning_rate']:.2e}",
                f"grad {record['gradient_norm']:6.2f}",
                f"tau {record['temperature']:.4f}",
                f"alpha {record['alpha']:.2f}",
                f"{self._pairs / seconds:7.1f} pairs/s",
                f"{self._tokens / seconds:8.0f} tokens/s",
                f"pos {record['positive_similarity']:6.3f}",
                f"neg {record['hardest_negative_similarity']:6.3f}",
                f"waits {self._waited / seconds:4.0%}",
                *([f"{record['tflops']:.3g} TFLOP/s"] if "tflops" in record else []),
                *([f"MFU {record['mfu']:.0%}"] if "mfu" in record else []),
                *([f"{record['memory_gb']:.1f} GB"] if "memory_gb" in record else []),
                f"skipped {self._skipped}",
                f"left {timedelta(seconds=round(left))}",
            ]
        )

    def close(self) -> None:
        """Close the file and the sinks."""
        for sink in self._sinks:
            sink.close()
        self._sinks = ()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: str | Path) -> list[dict[str, float | int | str | None]]:
    """Records of a log in the order of their steps; a number that was not finite is None.

    A run that was resumed has repeated the steps after its checkpoint: the later record of a step counts. The last line
    may be cut short, where a run was killed.

    Raises:
        DataError: the file is missing, or a line other than the last is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"log {path} does not exist; training writes one into train.output")
    records: list[dict[str, float | int | str | None]] = []
    lines = path.read_bytes().split(b"\n")
    # What follows the last line end is a half-written record, or nothing.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is not a step's record; delete that line") from error
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    return records


def _append_line(file: FileIO, record: Mapping[str, Any]) -> None:
    """Write a whole line or nothing: a disk may be full in the middle of one.

    Raises:
        OSError: it cannot be written.
    """
    line, end = (json.dumps(record, allow_nan=False) + "\n").encode(), file.seek(0, os.SEEK_END)
    if file.write(line) < len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_half_line(path: Path) -> None:
    """Drop what a killed run left of its last line, so that the next one starts on a line of its own."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def _is_broken(value: float | int | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
