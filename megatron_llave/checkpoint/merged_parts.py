"""What a merged checkpoint was merged from, as its manifest keeps it for the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_llave.checkpoint import folders
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError

KEY = "merged"
"""The key of the manifest. Checkpoints that were merged before it was written do not have it."""


@dataclass(frozen=True)
class Part:
    """One of the checkpoints that were merged."""

    name: str
    """Own name of its folder, or of the output directory that it lies in."""
    share: float
    """Its weight in the mean."""
    weights: str
    """Where its weights came from, in words."""


def describe_parts(sources: Sequence[Path], shares: Sequence[float], cfgs: Sequence[RunConfig]) -> dict[str, Any]:
    """Return what the manifest of a merged checkpoint says of its parts, by key.

    Args:
        sources: the folders of the checkpoints.
        shares: of each in the mean.
        cfgs: the configurations in them.

    Raises:
        CheckpointError: a file of a checkpoint is damaged.
    """
    parts = []
    for folder, share, cfg in zip(sources, shares, cfgs):
        place = folder.resolve()
        name = place.parents[1].name if place.parent.name == folders.FOLDER else place.name
        manifest = folders.require_intact(folder)
        parts.append(asdict(Part(name, share, _weights(manifest, cfg))))
    return {KEY: parts}


def _weights(manifest: Mapping[str, Any], cfg: RunConfig) -> str:
    if manifest["layout"] is not None:
        return f"trained, {manifest['step']} of {cfg.train.steps} steps"
    return "merged from several checkpoints" if is_merged(manifest, cfg) else "converted, not trained"


def is_merged(manifest: Mapping[str, Any], cfg: RunConfig) -> bool:
    """Whether llave merge wrote a checkpoint.

    Of those without KEY, only one whose first part was a run's is known: it has the configuration of a run that did not
    write it.
    """
    return KEY in manifest or (manifest["layout"] is None and cfg.train.steps > 0)


def read_parts(manifest: Mapping[str, Any], folder: Path) -> list[Part]:
    """Return the parts of a merged checkpoint; none if its manifest does not name them.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    try:
        parts = [Part(**part) for part in manifest.get(KEY, [])]
        if not all(isinstance(part.share, float | int) for part in parts):
            raise TypeError("a share is no number")
    except TypeError as error:
        raise CheckpointError(f"{folder / folders.MANIFEST} is damaged: {KEY}: {error}") from error
    return parts
