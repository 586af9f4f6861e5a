"""Draw the curves of one run or of several: loss, learning rate, similarities, overlap, throughput, waits, evaluations.

python tools/plot.py runs/a runs/b [--out runs.png] [--along step|pairs|hours]

Also while a run goes on: it reads log.jsonl and evaluations.jsonl in the runs' folders, and nothing else.
"""

import argparse
import json
import math
from pathlib import Path

from megatron_llave.errors import DataError, exit_with_one_line, require
from megatron_llave.report.plots import plot_runs
from megatron_llave.training.logger import EVALUATIONS_FILE, LOG_FILE, read_log


def main() -> None:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (train.output)")
    parser.add_argument("--out", help="the PNG; default: curves.png in the only run's folder, else here")
    parser.add_argument("--along", choices=("step", "pairs", "hours"), default="step", help="horizontal axis")
    args = parser.parse_args()
    with exit_with_one_line():
        folders = {name: Path(run) for name, run in zip(short_names(args.runs), args.runs)}
        out = Path(args.out) if args.out else Path(args.runs[0] if len(args.runs) == 1 else ".") / "curves.png"
        require(out.suffix == ".png", f"--out {out} must end in .png")
        logs = {name: read_log(folder / LOG_FILE) for name, folder in folders.items()}
        for name, records in logs.items():
            require(len(records) > 0, f"{folders[name] / LOG_FILE} has no step yet")
        scores = {name: read_evaluations(folder / EVALUATIONS_FILE) for name, folder in folders.items()}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            plot_runs(logs, scores, out, args.along)
        except OSError as error:
            raise DataError(f"{out} cannot be written: {error.strerror}") from error
        print(f"{out}: {', '.join(f'{name} ({len(records)} steps)' for name, records in logs.items())}")


def short_names(runs: list[str]) -> list[str]:
    """The last parts of the runs' paths, as many as tell them apart.

    Raises:
        ConfigError: a run is named twice.
    """
    paths = [Path(run).resolve() for run in runs]
    twice = next((run for index, run in enumerate(runs) if paths[index] in paths[:index]), None)
    require(twice is None, f"{twice} is given twice")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_evaluations(path: Path) -> list[tuple[int, float]]:
    """(step, mean Precision@1 in percent) in the order of the steps; of repeated ones the later counts.

    NaN where a set has no score: embeddings were not finite.

    Raises:
        DataError: a line other than a half-written last one is no evaluation.
    """
    if not path.is_file():
        return []
    found: dict[int, float] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            scores = [math.nan if score is None else score for score in record["precision_at_1"].values()]
            found[int(record["step"])] = sum(scores) / len(scores)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise DataError(f"{path} line {number} is not an evaluation; delete that line") from error
    return sorted(found.items())


if __name__ == "__main__":
    main()
