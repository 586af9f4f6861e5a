"""The versions of the programs that compute a run, for its checkpoints and reports."""

import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_llave import __version__

ROOT = Path(__file__).resolve().parents[1]


@cache
def program_versions() -> str:
    """Versions of this package, with the commit of its clone, of torch, megatron-core and Python, in one line."""
    return (
        f"megatron_llave {__version__}{commit(ROOT)}, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}, Python {sys.version.split()[0]}"
    )


def commit(root: Path) -> str:
    """` (git COMMIT)` of a clone, with `-dirty` where files differ from it; "" outside of a clone or without git."""
    if not (root / ".git").exists():  # an installed package may lie within someone else's repository
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (git {done.stdout.strip()})"
