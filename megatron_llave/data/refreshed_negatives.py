"""Negatives that a run mines for itself while it trains (`mining.interval`): where they are, and which step has which.

    OUTPUT/negatives/step-0000400/    negatives that the checkpoint after 400 steps has found (mined_negatives.py)

With an interval of N, the checkpoint after k N steps (k = 1, 2, ...) is mined in the background (mining/refresh.py),
while N further steps are trained. The steps from (k + 1) N + 1 to (k + 2) N, counted from 1, have its negatives, and
those before 2 N + 1 have data.negatives. So which negatives a step has depends on its number alone, never on how long a
mining takes.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llave.config.schema import RunConfig
from megatron_llave.data.index import Index
from megatron_llave.data.mined_negatives import MinedNegatives, is_complete, open_negatives
from megatron_llave.errors import DataError

FOLDER = "negatives"
_STEP = re.compile(r"step-(\d{7,15})")


def mined_after(step: int, interval: int) -> int:
    """The number of steps after which the negatives of a step, counted from 1, were mined; 0: not by the run."""
    return max(0, (step - 1) // interval - 1) * interval if interval else 0


def last_step_with(mined: int, interval: int) -> int:
    """The last step, counted from 1, with the negatives that were mined after `mined` steps; 0: with data.negatives."""
    return mined + 2 * interval


def folder_of(output: str | Path, mined: int) -> Path:
    """The folder of the negatives that were mined after `mined` steps of the run in an output directory."""
    return Path(output) / FOLDER / f"step-{mined:07d}"


def all_mined(output: str | Path) -> list[int]:
    """The numbers of steps after which the folders in an output directory were mined, complete or not."""
    folder = Path(output) / FOLDER
    matches = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in matches if match)


def unmined(output: str | Path, interval: int, done: int, last: int | None = None) -> list[int]:
    """The checkpoints that a run still has to mine, or is mining, each as its number of steps.

    Args:
        output: output directory of the run.
        interval: steps between minings; 0: none.
        done: steps done.
        last: steps of the whole run. What no step will use is not mined. None: the run may get more steps.
    """
    first = max(interval, mined_after(done + 1, interval))
    newest = done if last is None else min(done, last - 1 - interval)
    candidates = range(first, newest + 1, interval) if interval else ()
    return [step for step in candidates if not is_complete(folder_of(output, step))]


@dataclass(frozen=True)
class StepNegatives:
    """Opens the negatives of steps."""

    cfg: RunConfig
    index: Index
    """That of data.path."""
    names: list[str]
    """The subsets of the run."""
    most_open: int
    """Number of files that each reader of negatives keeps open."""

    def of_step(self, step: int) -> MinedNegatives | None:
        """Open the negatives of a step, counted from 1: data.negatives before the first that the run has mined.

        Raises:
            DataError: they are missing or incomplete, or as mined_negatives.open_negatives.
        """
        data, interval = self.cfg.data, self.cfg.mining.interval
        mined = mined_after(step, interval)
        if mined:
            folder = folder_of(self.cfg.train.output, mined)
            if not is_complete(folder):
                steps = f"steps {mined + interval + 1} to {last_step_with(mined, interval)}"
                hint = "put the folder back, or resume from an earlier checkpoint"
                raise DataError(f"{folder}, which the run has mined for {steps}, is missing or incomplete; {hint}")
            data = replace(data, negatives=str(folder))
        return open_negatives(data, self.index, self.names, self.most_open)
