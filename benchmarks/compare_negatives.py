"""What more negatives are worth on the embedded benchmark: global_batch beside micro_batch, same pairs, same updates.

    python benchmarks/compare_negatives.py [key=value ...] --data runs/openmoji [--out runs/negatives] [--seeds 0 1 2]

Trains examples/tiny.yaml on two data-parallel ranks, global batch 64 in micro batches of 8, once per seed and arm, and
evaluates each run. A query sees 64 targets under `global_batch` and 16 under `micro_batch` (its own micro batch on both
ranks). A run that has its report is not repeated if its settings were the same. Prints a Markdown table of Precision@1.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_llave import config_file
from megatron_llave.run_log import LOG_FILE, read_log

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("micro_batch", "global_batch")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(arm: str, seed: int, data: Path, out: Path, overrides: list[str]) -> Path:
    """Train and evaluate one run unless it has its report; returns its folder."""
    folder = out / f"{arm}-seed{seed}"
    settings = [f"loss.negatives={arm}", f"train.seed={seed}", f"data.path={data}", f"train.output={folder}"]
    settings += ["train.micro_batch_size=8", *overrides]
    if (folder / "report" / "report.json").is_file():
        if config_file.load(folder / "config.yaml") != config_file.load(ROOT / "examples" / "tiny.yaml", settings):
            raise SystemExit(f"error: {folder} holds a run with other settings; choose another --out")
    else:
        subprocess.run([*TORCHRUN, str(ROOT / "examples" / "pretrain_llave_tiny.sh"), *settings], check=True)
        evaluate = [str(ROOT / "tools" / "evaluate.py"), "--checkpoint", str(folder), "--data", str(data)]
        subprocess.run([*TORCHRUN, *evaluate, "--out", str(folder / "report")], check=True)
    return folder


def measure(folder: Path) -> dict[str, float]:
    """Precision@1 of every set, their mean, and what the log says of the run's last hundred steps and its time."""
    report = json.loads((folder / "report" / "report.json").read_text())
    records = read_log(folder / LOG_FILE)
    measured = {f"{one['name']} ({one['split']})": one["precision_at_1"] for one in report["sets"]}
    measured["mean of the held-out sets"] = report["means"]["held_out"]
    last = records[-100:]
    measured["effective negatives, last 100 steps"] = statistics.fmean(r["effective_negatives"] for r in last)
    measured["seconds per step, median"] = statistics.median(r["seconds"] for r in records)
    return measured


def main() -> None:
    """All runs, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that tools/prepare_data.py openmoji made")
    parser.add_argument("--out", default=Path("runs/negatives"), type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    args = parser.parse_args()
    settings = args.data, args.out, args.overrides
    runs = {(arm, seed): measure(run(arm, seed, *settings)) for seed in args.seeds for arm in ARMS}
    heads = [f"{arm} {seed}" for arm in ARMS for seed in args.seeds]
    print("|", " | ".join(["", *heads, *(f"{arm} mean" for arm in ARMS), "difference"]), "|")
    print("|---" + "|---:" * (len(heads) + len(ARMS) + 1) + "|")
    for name in runs[ARMS[0], args.seeds[0]]:
        values = {arm: [runs[arm, seed][name] for seed in args.seeds] for arm in ARMS}
        means = [statistics.fmean(values[arm]) for arm in ARMS]
        cells = [x for arm in ARMS for x in values[arm]] + means + [means[1] - means[0]]
        print("|", " | ".join([name, *(f"{x:.1f}" if abs(x) >= 1 else f"{x:.2f}" for x in cells)]), "|")


if __name__ == "__main__":
    main()
