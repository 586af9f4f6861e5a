"""Check the nodes before a run: their speed, clocks, disks, memory and versions, in one table and one line per fault.

The command is in megatron_llave/commands/preflight.py; `python tools/preflight.py --help` explains it.
"""

import sys

from megatron_llave.commands.preflight import main

if __name__ == "__main__":
    sys.exit(main())
