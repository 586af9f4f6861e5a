"""Draw the curves of one or several runs: loss, also by subset, learning rate, similarities, throughput, scores.

The command is in megatron_llave/commands/plot.py; `python tools/plot.py --help` explains it.
"""

import sys

from megatron_llave.commands.plot import main

if __name__ == "__main__":
    sys.exit(main())
