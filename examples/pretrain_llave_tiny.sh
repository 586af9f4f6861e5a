#!/usr/bin/env bash
""":"
# Trains the tiny LLaVE of tiny.yaml, which lies beside this file, on a laptop too. Any of:
#     bash examples/pretrain_llave_tiny.sh [--resume auto] [section.key=value ...]
#     torchrun --nproc-per-node 2 examples/pretrain_llave_tiny.sh [--resume auto] [section.key=value ...]
#     torchrun --no-python --nproc-per-node 2 examples/pretrain_llave_tiny.sh [--resume auto] [section.key=value ...]
# docs/getting_started.md has more, also for several nodes.
# This file is bash and Python at once: to Python the bash half is one string, to bash the Python half is a text that
# it never reaches. launch.py starts torchrun; every rank runs the Python half.
if [[ -n "${LOCAL_RANK:-}" ]]; then  # torchrun --no-python has started this process: it is one rank
    exec python3 "${BASH_SOURCE[0]}" "$@"
fi
exec python3 "$(dirname "${BASH_SOURCE[0]}")/launch.py" "${BASH_SOURCE[0]}" "$@"
: <<'# end of the Python half'
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    file = Path(__file__).resolve()
    sys.path.insert(0, str(file.parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_llave.train import main

    config = file.with_name(file.stem.removeprefix("pretrain_llave_") + ".yaml")
    main(["--config", str(config), *sys.argv[1:]])
# end of the Python half
