#!/usr/bin/env bash
# Evaluates a checkpoint on MMEB with one data-parallel process per GPU of this machine, or with PROCS processes:
#     bash examples/eval_mmeb.sh --checkpoint CKPT --data MMEB-eval --images IMAGES --out runs/mmeb [parallel.tensor=2 ...]
# On several nodes, start torchrun --nnodes ... tools/evaluate.py mmeb ... on each of them (docs/evaluation.md).
set -euo pipefail
procs="${PROCS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}"
if [[ "$procs" == 0 ]]; then
    procs=2  # there is no GPU
fi
tool="$(dirname "${BASH_SOURCE[0]}")/../tools/evaluate.py"
exec torchrun --standalone --nproc-per-node "$procs" "$tool" mmeb "$@"
