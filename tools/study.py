"""Run one of the paper's experiments: its variants, each with several seeds, then tables and figures.

The command is in megatron_llave/commands/study.py; `python tools/study.py --help` explains it.
"""

import sys

from megatron_llave.commands.study import main

if __name__ == "__main__":
    sys.exit(main())
