"""Compute the weighted mean of the weights of several checkpoints of one model, and write it as a checkpoint.

The command is in megatron_llave/commands/merge.py; `python tools/merge.py --help` explains it.
"""

import sys

from megatron_llave.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
