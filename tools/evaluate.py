"""Evaluate a checkpoint on a benchmark: tables, figures, and one HTML report.

The command is in megatron_llave/commands/evaluate.py; `python tools/evaluate.py --help` explains it.
"""

import sys

from megatron_llave.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
