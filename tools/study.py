"""Run one of the paper's experiments: its arms, each with several seeds, then tables and pictures.

python tools/study.py hardness --config examples/studies/tiny.yaml --seeds 0,1,2 --out DIR [section.key=value ...]

The same command again goes on with what is missing, and writes the report anew. docs/studies.md has the rest.
"""

import argparse
import signal
import sys
from pathlib import Path

from megatron_llave import config_file
from megatron_llave.config import RunConfig
from megatron_llave.config_model import require
from megatron_llave.errors import exit_with_one_line
from megatron_llave.paper_results import ABLATIONS
from megatron_llave.study.arms import STUDIES, Run, plan
from megatron_llave.study.findings import read_findings
from megatron_llave.study.queue import Plan, run_all
from megatron_llave.study.write_up import write_up


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--config", required=True, help="configuration that all runs share")
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2), metavar="0,1,2", help="each arm runs with each")
    parser.add_argument("--out", required=True, help="folder of the runs and of the report; the same one goes on")
    parser.add_argument(
        "--arm", action="append", default=[], help="of the study's, besides the reference; default: all"
    )
    parser.add_argument("--start", metavar="FILE", help="configuration of a run that each seed's runs start from")
    parser.add_argument("--processes", type=int, default=2, help="of all runs at a time (2)")
    parser.add_argument("--per-run", type=int, default=1, help="processes of one run (1)")
    parser.add_argument("--task", type=int, metavar="N", help="only run N of the list, for a job array; no report")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    return parser.parse_intermixed_args()


def seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def ranks(cfg: RunConfig, processes: int) -> int:
    """Data-parallel ranks of a run."""
    return processes // (cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context)


def task(runs: list[Run], number: int) -> Run:
    """One of the runs, by its place in the list."""
    require(0 <= number < len(runs), f"--task {number}: the study has the runs 0 to {len(runs) - 1}")
    return runs[number]


def main() -> int:
    """Parse, run, report; returns the exit status."""
    args = parse()
    # A study that is asked to end asks its runs to save and stop.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with exit_with_one_line():
        require(args.processes >= args.per_run >= 1, f"--processes {args.processes} is less than one run's --per-run")
        out, start = Path(args.out), Path(args.start) if args.start else None
        shared = Plan(Path(args.config), start, out, tuple(args.overrides), args.per_run)
        cfg = config_file.load(args.config, args.overrides)
        study = STUDIES[args.study](cfg, ranks(cfg, args.per_run))
        runs = plan(study, cfg, args.seeds, args.arm, start is not None)
        if args.task is not None:
            runs = [task(runs, args.task)]
        outcome = run_all(shared, runs, args.processes, lambda line: print(line, flush=True))
        print(f"{outcome.num_before} runs were finished before, {outcome.num_done} were done now")
        for name, why in outcome.failed.items():
            print(f"failed: {name}: {why}")
        if args.task is None:
            findings = read_findings(out, study, runs, cfg.evaluate.sets, outcome.failed)
            write_up(findings, study, out, ABLATIONS.get(study.name))
            print(f"report: {out / 'report.md'}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
