"""README.md of an exported folder: its header for the hub, what the model is, and how it embeds.

convert/training_record.py appends how it was trained.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json


def model_card(
    header: Sequence[str],
    base: str | None,
    tags: Sequence[str],
    what: Sequence[str],
    embed: Sequence[str],
) -> str:
    """Return the card, but for its last sections about the training.

    Args:
        header: lines of the header before its tags.
        base: the hub name of the model that this one was made of, if it is known.
        tags: further tags of the hub.
        what: lines about the model.
        embed: lines about how to embed with it.
    """
    top = [
        *header,
        *([f"base_model: {base}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in ("embedding", "multimodal", *tags)),
    ]
    lines = ["---", *top, "---", "", "# Multimodal embedding model", "", *what, "", "## How to embed", "", *embed]
    return "\n".join(lines) + "\n"


def base_model(source: str | Path | None, owners: str) -> str | None:
    """Return the hub name that config.json of the source gives, if there is one.

    `owners` is a pattern of names of the hub: an `_name_or_path` of another shape may be a local folder.
    """
    file = None if source is None else Path(source) / "config.json"
    name = read_json(file, error=CheckpointError).get("_name_or_path") if file is not None and file.is_file() else None
    return name if re.fullmatch(rf"({owners})/[\w.-]+", str(name)) else None


def prompt_of(training_config: str | None) -> str | None:
    """Return data.prompt of a run's configuration in YAML; None: there was no run."""
    return None if training_config is None else OmegaConf.select(OmegaConf.create(training_config), "data.prompt")
