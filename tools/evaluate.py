"""Evaluate a checkpoint: Precision@1 of every evaluation set, tables and pictures.

torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint runs/tiny --data runs/openmoji [parallel.tensor=2 ...]
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from megatron_llave import cpu_emulation, parallel
from megatron_llave.data.evaluation_sets import read_evaluation
from megatron_llave.embedding import load_model
from megatron_llave.errors import exit_with_one_line
from megatron_llave.evaluate import evaluate
from megatron_llave.report import print_table, write_report
from megatron_llave.run_log import LOG_FILE, quiet_dependencies, read_log


def main() -> None:
    """Load at the layout asked for, embed, score, and let one rank write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's folder (its newest checkpoint) or one checkpoint")
    parser.add_argument("--data", required=True, help="folder that tools/prepare_data.py made, with its eval/")
    parser.add_argument("--out", help="report folder; default: evaluation/ or, with --average, evaluation-average/")
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        inputs, sets = read_evaluation(args.data)
        model = load_model(args.checkpoint, args.data, args.overrides, args.average)
        results = evaluate(model, inputs, sets)
        if dist.get_rank() == 0:
            log = Path(args.checkpoint) / LOG_FILE
            records = read_log(log) if log.is_file() else []
            out = Path(args.checkpoint) / ("evaluation-average" if args.average else "evaluation")
            out = Path(args.out) if args.out else out
            write_report(results, records, inputs, out)
            print_table(results)
            print(f"report, table and pictures: {out}")
        parallel.shut_down()


if __name__ == "__main__":
    main()
