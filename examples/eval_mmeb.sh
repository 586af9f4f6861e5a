#!/usr/bin/env bash
# Evaluates a checkpoint on MMEB with one process per GPU of this machine (PROCS=N: so many), all of them data parallel:
#     bash examples/eval_mmeb.sh --checkpoint CKPT --data MMEB-eval --images IMAGES --out runs/mmeb [parallel.tensor=2 ...]
# On several nodes: torchrun --nnodes ... tools/evaluate.py mmeb ... on each, as docs/evaluation.md says.
set -euo pipefail
procs="${PROCS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}"
if [[ "$procs" == 0 ]]; then
    procs=2  # no GPU
fi
tool="$(dirname "${BASH_SOURCE[0]}")/../tools/evaluate.py"
exec torchrun --standalone --nproc-per-node "$procs" "$tool" mmeb "$@"
