"""Mine hard negatives for a folder of training shards.

The command is in megatron_llave/commands/mine.py; `python tools/mine.py --help` explains it.
"""

import sys

from megatron_llave.commands.mine import main

if __name__ == "__main__":
    sys.exit(main())
