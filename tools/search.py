"""Search in one's own images by text, by image or by both: build an index, ask it, and serve it as a local web page.

The command is in megatron_llave/commands/search.py; `python tools/search.py --help` explains it.
"""

import sys

from megatron_llave.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
