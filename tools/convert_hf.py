"""Convert between Hugging Face folders and checkpoints (import, export), inspect one, or compare two (verify).

The command is in megatron_llave/commands/convert.py; `python tools/convert_hf.py --help` explains it.
"""

import sys

from megatron_llave.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
