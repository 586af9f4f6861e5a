"""Draw the curves of one or several runs: loss, also by subset, learning rate, similarities, throughput, scores.

`llave plot --help` explains the command; megatron_llave/options/plot.py has its options.
"""

import math
from pathlib import Path

from megatron_llave.errors import DataError, exit_with_one_line, require
from megatron_llave.files import parse_json
from megatron_llave.options.plot import parse
from megatron_llave.report.curves_page import write_curves_page
from megatron_llave.report.plots import plot_runs
from megatron_llave.training.logger import EVALUATIONS_FILE, LOG_FILE, read_log


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, read the logs, and draw."""
    args = parse(argv)
    with exit_with_one_line():
        folders = {name: Path(run) for name, run in zip(short_names(args.runs), args.runs)}
        default = Path(args.runs[0] if len(args.runs) == 1 else ".") / ("curves.html" if args.html else "curves.png")
        out = Path(args.out) if args.out else default
        require(out.suffix == ".html" or not args.html, f"--out {out} must end in .html with --html")
        require(out.suffix in (".png", ".html"), f"--out {out} must end in .png or .html")
        logs = {name: read_log(folder / LOG_FILE) for name, folder in folders.items()}
        for name, records in logs.items():
            require(len(records) > 0, f"{folders[name] / LOG_FILE} has no step yet")
        scores = {name: read_evaluations(folder / EVALUATIONS_FILE) for name, folder in folders.items()}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write = write_curves_page if out.suffix == ".html" else plot_runs
            write(logs, scores, out, args.along)
        except OSError as error:
            raise DataError(f"{out} cannot be written: {error.strerror}") from error
        print(f"{out}: {', '.join(f'{name} ({len(records)} steps)' for name, records in logs.items())}")


def short_names(runs: list[str]) -> list[str]:
    """The last parts of the paths of the runs, as many as are needed to distinguish them.

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
    """Pairs (step, mean Precision@1 in percent) in the order of the steps.

    If a step was evaluated more than once, the last evaluation counts. A mean is NaN if one of its sets has no score,
    because embeddings were not finite.

    Raises:
        DataError: a line is not an evaluation; only the last line may be incomplete.
    """
    if not path.is_file():
        return []
    means: dict[int, float] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line, str(path))
            scores = [math.nan if score is None else score for score in record["precision_at_1"].values()]
            means[int(record["step"])] = sum(scores) / len(scores)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise DataError(f"{path} line {number} is not an evaluation; delete that line") from error
    return sorted(means.items())
