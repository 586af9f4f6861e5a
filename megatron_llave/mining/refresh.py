"""Mines the checkpoints of a run while it trains: starts the command, waits where its result is due, and tidies up.

data/refreshed_negatives.py says which step has which negatives. The first rank starts `llave mine negatives` for a
checkpoint when that is current, as a process of its own with its output in OUTPUT/negatives/step-N.log. The kernel ends
that process when the rank ends, however that ends, and a resumed run starts it again, which continues.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.config.mining import MiningConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.mined_negatives import is_complete
from megatron_llave.data.refreshed_negatives import FOLDER, all_mined, folder_of, mined_after, unmined
from megatron_llave.distributed.collectives import largest_of_ranks
from megatron_llave.distributed.launcher import of_no_launcher
from megatron_llave.errors import CheckpointError, DataError
from megatron_llave.launch.start import RANK, end_with_parent
from megatron_llave.mining.approximate import require_faiss
from megatron_llave.mining.negatives_folder import read_complete
from megatron_llave.training.metrics import is_due

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
SECONDS_TO_END = 10
"""How long a mining that is of no use any more may take to end."""
LAST_BYTES = 4096
"""Bytes at the end of a log in which its last line is looked for."""


class Refresh:
    """The minings of a run, one at a time. Every rank calls the same methods at the same steps; the first one mines."""

    def __init__(
        self, cfg: RunConfig, done: int, writer: CheckpointWriter, progress: Callable[[str], None] = lambda doing: None
    ) -> None:
        """Start what the run, of which `done` steps are done, still has to mine.

        `progress` is called with a line of text while negatives are waited for.

        Raises:
            CheckpointError: on the first rank, a checkpoint that is to be mined is gone.
            ConfigError: on the first rank, mining.search is faiss, which cannot be imported.
        """
        self._cfg, self._writer, self._progress = cfg, writer, progress
        self._output, self._interval, self._done = cfg.train.output, cfg.mining.interval, done
        self._mines = self._interval > 0 and dist.get_rank() == 0
        self._process: subprocess.Popen | None = None
        self._mined, self._started = 0, 0.0  # which checkpoint the process mines, and since when
        self._waited = 0.0  # seconds, before the current step
        self._to_mine = unmined(self._output, self._interval, done, cfg.train.steps) if self._mines else []
        for step in self._to_mine:
            checkpoint = folders.step_folder(self._output, step)
            if not checkpoint.is_dir():
                what = f"{folder_of(self._output, step)} is missing or incomplete, and so is {checkpoint}"
                hint = "put one of them back, or resume from an earlier checkpoint"
                raise CheckpointError(f"{what}, with which the run would mine it; {hint}")
        if self._mines:
            if cfg.mining.search == "faiss" and cfg.mining.processes and find_spec("faiss") is None:
                require_faiss()  # at once; where it is there, only the processes that mine load it
            if cfg.train.steps <= 2 * self._interval:
                hint = f"step {2 * self._interval + 1} would be the first with negatives of the run"
                logger.warning("mining.interval=%d: the run ends before it mines; %s", self._interval, hint)
            tidy(self._output, self._interval, done)
            self._look()

    def after(self, step: int) -> None:
        """Start and end minings after a step, whose checkpoint, if it has one, is current or being written.

        Raises:
            DataError: on the first rank, a mining has failed.
            CheckpointError: on the first rank, a checkpoint that is to be mined could not be saved.
        """
        self._done = step
        if self._mines and is_due(step, self._interval) and step + self._interval < self._cfg.train.steps:
            self._to_mine.append(step)
        self._look()

    def wait(self, step: int, stop_reason: Callable[[], str]) -> str:
        """Wait until the negatives of a step, counted from 1, are complete; a collective over all ranks.

        Args:
            step: the step.
            stop_reason: says on all ranks why the run is to stop; "" if it is to go on.

        Returns:
            Why the run is to stop and not to wait any longer, or "".

        Raises:
            DataError, CheckpointError: as `after`.
        """
        mined, started, self._waited = mined_after(step, self._interval), time.perf_counter(), 0.0
        if mined == mined_after(step - 1, self._interval):
            return ""
        has_told = False
        while largest_of_ranks(not is_complete(folder_of(self._output, mined)))[0]:
            if reason := stop_reason():
                return reason
            doing = f"waiting for the negatives of step {mined}"
            if not has_told and dist.get_rank() == 0:
                logger.info("step %d: %s", step, doing)
            has_told = True
            self._progress(doing)
            self._look()
            self._writer.poll()
            time.sleep(POLL_SECONDS)
        if self._mines and not self._cfg.mining.processes:
            self._finish(mined, "complete")
        self._waited = time.perf_counter() - started
        return ""

    def record(self, step: int) -> dict[str, float | int]:
        """What the record of a step, counted from 1, says of negatives that the run has mined."""
        mined = mined_after(step, self._interval)
        return {"negatives_age": step - 1 - mined, "mining_seconds": self._waited} if mined else {}

    def close(self) -> None:
        """End a mining that still goes on, and remove what nobody needs any more."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._process is not None and is_complete(folder_of(self._output, self._mined)):
            self._finish(self._mined, self._lasted())  # what was ended has written its report at most
        elif self._mines:
            tidy(self._output, self._interval, self._done)

    def _look(self) -> None:
        """Note the end of a mining, and start the next one if its checkpoint is current."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None and self._to_mine:
            step = self._to_mine[0]
            if folders.step_folder(self._output, step).is_dir():
                self._start(self._to_mine.pop(0))
            elif self._writer.saving != step:
                what = f"the checkpoint after step {step}, which is to be mined, could not be saved"
                raise CheckpointError(f"{what}; the log says why. A resumed run continues from the one before")

    def _start(self, mined: int) -> None:
        tidy(self._output, self._interval, self._done)
        arguments = mining_arguments(self._cfg, mined)
        if not self._cfg.mining.processes:
            due = mined + self._interval + 1
            command = shlex.join(["llave", *arguments])
            logger.info("negatives of step %d: to be mined before step %d by %s", mined, due, command)
            return
        log = _log_of(self._output, mined)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(RANK), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=of_no_launcher(os.environ),
                start_new_session=True,  # a Ctrl-C in the terminal lets the run save, which ends the mining then
                preexec_fn=end_with_parent,
            )
        self._mined, self._started = mined, time.monotonic()
        logger.info("negatives of step %d: being mined in the background, see %s", mined, log)

    def _end(self) -> None:
        status, self._process = self._process.returncode, None
        folder, log = folder_of(self._output, self._mined), _log_of(self._output, self._mined)
        if not is_complete(folder):
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            what = f"mining the negatives of step {self._mined} has failed with {how}; {log} ends with"
            raise DataError(f"{what}: {_last_line(log)}; a resumed run tries again")
        if status:
            logger.warning("%s is complete, but what followed has failed; see %s", folder, log)
        self._finish(self._mined, self._lasted())

    def _lasted(self) -> str:
        return f"mined in {time.monotonic() - self._started:.0f} s"

    def _finish(self, mined: int, how: str) -> None:
        subsets = read_complete(folder_of(self._output, mined))["subsets"].values()
        each = sum(one["kept"] for one in subsets) / max(1, sum(one["queries"] for one in subsets))
        logger.info("negatives of step %d: %s, %.1f per query", mined, how, each)
        tidy(self._output, self._interval, self._done)


def mining_arguments(cfg: RunConfig, mined: int) -> list[str]:
    """The arguments with which `llave` mines the checkpoint after `mined` steps of a run, by the run's own rules."""
    mining, tensor = cfg.mining, cfg.parallel.tensor
    places = {"--data": cfg.data.path, "--out": folder_of(cfg.train.output, mined)}
    named = [f"{key}={Path(place).absolute()}" for key, place in places.items()]
    changed = {name: value for name, value in mining.options.items() if value != getattr(MiningConfig, name)}
    rules = [f"--{name.replace('_', '-')}={'none' if value is None else value}" for name, value in changed.items()]
    return [
        *("mine", "negatives", "--checkpoint", str(folders.step_folder(cfg.train.output, mined).absolute())),
        *(("--subsets", *cfg.data.subsets) if cfg.data.subsets else ()),
        *(*named, *rules),
        *((f"--procs={mining.processes}",) if mining.processes else ()),
        *((f"parallel.tensor={tensor}",) if tensor > 1 else ()),
    ]


def tidy(output: str | Path, interval: int, done: int) -> None:
    """Remove folders of negatives that no step needs, and embeddings of those that are complete.

    A run needs those of the steps after the `done` ones, and of those that would follow a checkpoint that is kept.
    What later checkpoints have found is removed, since these steps are done again.
    """
    points = {done, *(step for step in folders.all_steps(output) if step <= done)}
    needed = {
        mined for step in points for mined in range(max(interval, mined_after(step + 1, interval)), step + 1, interval)
    }
    for mined in all_mined(output):
        folder = folder_of(output, mined)
        if mined not in needed:
            # Rename it first, since a folder that is half removed must not look complete.
            os.replace(folder, folder.with_suffix(".replaced"))
        if mined not in needed or is_complete(folder):
            shutil.rmtree(folder.with_suffix(".embeddings"), ignore_errors=True)
    for left in (Path(output) / FOLDER).glob("step-*.replaced"):
        shutil.rmtree(left, ignore_errors=True)


def _log_of(output: str | Path, mined: int) -> Path:
    return folder_of(output, mined).with_suffix(".log")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
