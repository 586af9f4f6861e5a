"""One process of a command that start.py starts on several: `rank.py COMMAND [argument ...]`.

It is started by its path, so that it takes the package that it belongs to, whatever lies in the working directory.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # was this folder, where imports must not look
    sys.exit(importlib.import_module("megatron_llave.__main__").main())
