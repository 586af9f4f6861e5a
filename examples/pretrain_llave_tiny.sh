#!/usr/bin/env bash
""":"
# Trains the tiny LLaVE of tiny.yaml, which lies beside this file. Any of:
#     bash examples/pretrain_llave_tiny.sh [section.key=value ...]
#     torchrun --nproc-per-node 2 examples/pretrain_llave_tiny.sh [section.key=value ...]
#     torchrun --no-python --nproc-per-node 2 examples/pretrain_llave_tiny.sh [section.key=value ...]
# The first starts torchrun itself: one process per GPU, or two without a GPU, or PROCS. On several nodes run it on
# each one with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, as a scheduler does.
# This file is bash and Python at once: to Python the bash half is one string, to bash the Python half is a text that
# it never reaches. Every rank runs the Python half.
set -euo pipefail

file="${BASH_SOURCE[0]}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ -n "${LOCAL_RANK:-}" ]]; then  # torchrun --no-python has started this process: it is one rank
    exec python3 "$file" "$@"
fi

gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
procs="${PROCS:-$((gpus > 0 ? gpus : 2))}"
nodes=(--standalone)
if [[ "${NNODES:-1}" -gt 1 ]]; then
    nodes=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?must be set when NNODES is}")
    nodes+=(--master-addr "${MASTER_ADDR:?must be set when NNODES is}" --master-port "${MASTER_PORT:-29500}")
fi
exec python3 -m torch.distributed.run --nproc-per-node "$procs" "${nodes[@]}" "$file" "$@"
: <<'# end of the Python half'
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parent))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_llave.train import main

    main(["--config", str(here / "tiny.yaml"), *sys.argv[1:]])
# end of the Python half
