"""Plan a run before it is started: parameters, FLOPs, memory of each rank by part, communication, and whether it fits.

The command is in megatron_llave/commands/plan.py; `python tools/plan.py --help` explains it.
"""

import sys

from megatron_llave.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
