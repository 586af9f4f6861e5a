"""Embed texts and images with a checkpoint, or all inputs of a JSONL file or of a folder of training shards.

The command is in megatron_llave/commands/embed.py; `python tools/embed.py --help` explains it.
"""

import sys

from megatron_llave.commands.embed import main

if __name__ == "__main__":
    sys.exit(main())
