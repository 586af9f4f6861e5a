"""Make a folder of training shards, inspect one, or verify one: `prepare_data.py COMMAND ...`. See docs/data.md.

The command is in megatron_llave/commands/prepare.py; `python tools/prepare_data.py --help` explains it.
"""

import sys

from megatron_llave.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
