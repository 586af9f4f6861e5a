"""Run one of the paper's experiments: its variants, each with several seeds, then tables and figures.

llave study hardness --config studies/tiny --seeds 0,1,2 --out DIR [section.key=value ...]

If the command is repeated, it runs only what is missing and writes the report again. See docs/studies.md.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line, require
from megatron_llave.report.paper_results import ABLATION_NOTES, ABLATIONS
from megatron_llave.study.findings import read_findings
from megatron_llave.study.queue import run_all
from megatron_llave.study.run_folder import Plan, is_finished
from megatron_llave.study.variants import STUDIES, Run, Study, plan
from megatron_llave.study.write_up import write_up

MOST_PROCESSES = 10_000
"""The largest number of processes at a time."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--config", required=True, help="configuration that all runs share")
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2), metavar="0,1,2", help="each variant runs with each")
    parser.add_argument("--out", required=True, help="folder of the runs and of the report; the same folder resumes")
    parser.add_argument(
        "--variant", action="append", default=[], help="run this variant and the reference only; may be repeated"
    )
    parser.add_argument("--start", metavar="FILE", help="configuration of a run that each seed's runs start from")
    parser.add_argument("--processes", type=int, default=2, help="processes of all runs at a time (2)")
    parser.add_argument("--per-run", type=int, default=1, help="processes of one run (1)")
    parser.add_argument(
        "--task", metavar="N|list", help="run only number N of the list, for a job array; or print the list"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    return parser


def seeds(text: str) -> tuple[int, ...]:
    """Parse `0,1,2`; argparse reports a ValueError."""
    numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    if not all(0 <= seed < 2**31 for seed in numbers):
        raise ValueError
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Parse, run, report; returns the exit status."""
    args = build_parser().parse_intermixed_args(argv)
    # Turn SIGTERM into an exception, so that the queue asks its runs to save and stop.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with exit_with_one_line():
        try:
            return run(args)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except OSError as error:
            raise ConfigError(f"--out {args.out}: {error.filename} cannot be written: {error.strerror}") from error


def run(args: argparse.Namespace) -> int:
    """Check the arguments and run the study; returns the exit status."""
    require(args.out != "" and "${" not in args.out, f"--out {args.out!r} is no name for a folder of runs")
    require(args.processes <= MOST_PROCESSES, f"--processes {args.processes} must be at most {MOST_PROCESSES}")
    wrong = f"--per-run {args.per_run} is no number from 1 to --processes {args.processes}"
    require(args.processes >= args.per_run >= 1, wrong)
    cfg, out = load_config(args.config, args.overrides), Path(args.out).absolute()
    start = Path(args.start) if args.start else None
    layout = cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context
    require(args.per_run % layout == 0, f"--per-run {args.per_run} is no multiple of tensor x pipeline = {layout}")
    study = STUDIES[args.study](cfg, args.per_run // layout)
    runs = plan(study, cfg, args.seeds, args.variant, start is not None)
    shared = Plan(Path(args.config), start, out, tuple(args.overrides), args.per_run)
    if args.task == "list":
        for number, planned in enumerate(runs):
            say(f"{number:4} {planned.name}{'  finished' if is_finished(shared.folder(planned)) else ''}")
        return 0
    return run_study(study, shared, runs, args, cfg)


def run_study(study: Study, shared: Plan, runs: list[Run], args: argparse.Namespace, cfg: RunConfig) -> int:
    """Run all runs and write the report, or run only one of them; returns the exit status."""
    asked = runs
    if args.task is not None:
        is_number = re.fullmatch("[0-9]{1,6}", args.task) and int(args.task) < len(runs)
        require(bool(is_number), f"--task {args.task}: the study has the runs 0 to {len(runs) - 1}")
        asked = [runs[int(args.task)]]
    outcome = run_all(shared, study.name, asked, args.processes, say)
    say(f"{outcome.num_before} runs were finished before, {outcome.num_done} were done now")
    for name, why in outcome.failed.items():
        say(f"failed: {name}: {why}")
    if args.task is None:
        findings = read_findings(shared.out, study, runs, cfg.evaluate.sets, outcome.failed)
        paper = ABLATIONS.get(study.name), ABLATION_NOTES.get(study.name, "")
        write_up(findings, study, shared.out, *paper)
        say(f"report: {shared.out / 'report.md'}")
    return 1 if outcome.failed else 0


def say(line: str) -> None:
    """Print a line and flush it, so that it appears at once even if stdout is a file."""
    print(line, flush=True)
