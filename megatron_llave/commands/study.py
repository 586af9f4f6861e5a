"""Run one of the paper's experiments: its variants, each with several seeds, then tables and figures.

`llave study --help` explains the command; megatron_llave/options/study.py has its options.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import ConfigError, exit_with_one_line, require
from megatron_llave.options.study import parse
from megatron_llave.report.paper_results import ABLATION_NOTES, ABLATIONS
from megatron_llave.study.findings import read_findings
from megatron_llave.study.queue import run_all
from megatron_llave.study.run_folder import Plan, is_finished
from megatron_llave.study.variants import STUDIES, Run, Study, plan
from megatron_llave.study.write_up import write_up

MOST_PROCESSES = 10_000
"""The largest number of processes at a time."""


def main(argv: list[str] | None = None) -> int:
    """Parse, run, report; returns the exit status."""
    args = parse(argv)
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
