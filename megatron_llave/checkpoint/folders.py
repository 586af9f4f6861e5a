"""The folders that checkpoints are: which one is current, which are whole, which are kept.

    OUTPUT/checkpoints/step-0002400/    weights, optimizer, ... (state.py), config.yaml, data.json (where the
                                        data is), manifest.json (step, layout, size of every file)
    OUTPUT/checkpoints/latest           the name of the newest whole one

A checkpoint is written under a temporary name (async_writer.py), renamed when whole, and made current by replacing
`latest` in one move: a killed save leaves the previous one current.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_llave.config.load import load_config, save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError

FOLDER = "checkpoints"
POINTER = "latest"
CONFIG = "config.yaml"
POSITION = "data.json"
MANIFEST = "manifest.json"
ASSETS = "assets"
"""Folder with the tokenizer and, of a converted model, what an export gives back (convert/hf.py); in a run's folder,
and in each of its checkpoints, where large files are links to the run's."""
AVERAGE = "average."
"""Before the names of averaged weights."""
FORMAT = "megatron_llave checkpoint"
VERSION = 1
_STEP = re.compile(r"step-(\d{7,})")


def step_folder(output: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` steps goes."""
    return Path(output) / FOLDER / f"step-{step:07d}"


def begin(partial: Path, cfg: RunConfig, position: dict | None) -> None:
    """An empty checkpoint folder with all that is no tensor.

    Raises:
        OSError: it cannot be written.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_config(cfg, partial / CONFIG)
    if position is not None:
        (partial / POSITION).write_text(json.dumps(position, indent=1) + "\n")
    assets = Path(cfg.train.output) / ASSETS
    if assets.is_dir():
        shutil.copytree(assets, partial / ASSETS, copy_function=link)


def finish(partial: Path, final: Path, step: int, layout: dict[str, int]) -> None:
    """Make a wholly written checkpoint the current one.

    Raises:
        OSError: the disk is full; the one before stays current.
    """
    files = {str(path.relative_to(partial)): _size(path) for path in _files(partial)}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "layout": layout, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_to(final)


def _point_to(final: Path) -> None:
    pointer = final.with_name(f"{POINTER}.partial")
    pointer.write_text(final.name + "\n")
    os.replace(pointer, final.with_name(POINTER))


def _size(path: Path) -> int:
    """Bytes, as the server of a network file system has them: it may be another machine that wrote them just now."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove_old(output: str | Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints that are not to be kept (config.CheckpointConfig), and what killed saves have left.

    Raises:
        OSError: one cannot be removed.
    """
    folder = Path(output) / FOLDER
    steps = sorted(all_steps(output), reverse=True)
    for step in steps[keep_last:] if keep_last else []:
        if not keep_every or step % keep_every:
            # First the name: half a checkpoint must not look like one.
            os.replace(step_folder(output, step), folder / f"step-{step:07d}.replaced")
    for left in (*folder.glob("step-*.replaced"), *folder.glob("step-*.partial")):
        shutil.rmtree(left)


def abandon_later(output: str | Path, folder: Path) -> list[Path]:
    """Set aside a run's checkpoints after the one that it goes back to, which would count as newer than what it saves.

    Args:
        output: of the run.
        folder: the checkpoint that it goes on from, perhaps of another run; then nothing is later.

    Returns:
        Where they are now: step-N.abandoned, or .abandoned-2 and so on. None is removed.
    """
    home = Path(output) / FOLDER
    match = _STEP.fullmatch(folder.name)
    if match is None or folder.resolve().parent != home.resolve():
        return []
    moved = []
    for step in sorted(step for step in all_steps(output) if step > int(match[1])):
        source, number = step_folder(output, step), 1
        target = source.with_suffix(".abandoned")
        while target.exists():
            number += 1
            target = source.with_suffix(f".abandoned-{number}")
        os.replace(source, target)
        moved.append(target)
    _point_to(folder.resolve())
    return moved


def all_steps(output: str | Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, whole ones or not."""
    folder = Path(output) / FOLDER
    found = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match[1]) for match in found if match]


def newest_usable(output: str | Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run; `report` is told of newer ones that are not, and why.

    Newer than the current one is a checkpoint whose save was killed just before it was made current: it is whole.
    """
    for step in sorted(all_steps(output), reverse=True):
        folder = step_folder(output, step)
        try:
            require_whole(folder)
            return folder
        except CheckpointError as error:
            report(str(error))
    return None


def require_whole(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every file of which is there with its size.

    Raises:
        CheckpointError: names what is missing or of another size.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        is_known = manifest["format"] == FORMAT and manifest["version"] == VERSION
        files, step = dict(manifest["files"]), int(manifest["step"])
    except FileNotFoundError as error:
        why = "it is not a checkpoint of a run, or not a whole one"
        raise CheckpointError(f"{folder} has no {MANIFEST}: {why}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__} {error}") from error
    if not is_known:
        found = f"{manifest['format']!r} version {manifest['version']!r}"
        raise CheckpointError(f"{folder} is {found}, this code reads {FORMAT!r} version {VERSION}")
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            found = path.stat().st_size
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} has {found} bytes, written were {size}")
    return manifest | {"step": step}


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """`KEY was A, is B` for each value that differs between two nested dicts."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return found


def require_same_run(folder: Path, cfg: RunConfig) -> list[str]:
    """Whether a run with this configuration can go on from checkpoint `folder`.

    Returns:
        What else differs and is taken from `cfg`: learning rate, loss and so on.

    Raises:
        CheckpointError: the model, its frozen parts or the reward are others.
    """
    saved = load_config(folder / CONFIG, leave_out=["parallel"])
    model = differences(asdict(saved.model), asdict(cfg.model))
    changed = [f"model.{line}" for line in model if line.split()[0] not in ("preset", "kernels", "recompute")]
    if saved.loss.reward != cfg.loss.reward:
        changed.append(f"loss.reward was {saved.loss.reward}, is {cfg.loss.reward}")
    if changed:
        hint = "go on with the same model, or start a new run from its weights with checkpoint.init"
        raise CheckpointError(f"checkpoint {folder} is of another model: {'; '.join(changed)}; {hint}")
    sections = ("loss", "optimizer", "train")
    return [
        f"{section}.{line}"
        for section in sections
        for line in differences(asdict(getattr(saved, section)), asdict(getattr(cfg, section)))
    ]


def link(source: str, target: str) -> None:
    """A hard link, so that a large file is stored once; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the current one of a run's output folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, path / FOLDER):
        if (folder / POINTER).is_file():
            path = folder / (folder / POINTER).read_text(errors="replace").strip()
            break
    try:
        is_checkpoint = dist_checkpointing.check_is_distributed_checkpoint(str(path))
    except ValueError as error:  # its JSON is damaged
        raise CheckpointError(f"{path}/metadata.json is damaged: {error}") from error
    if not (path / CONFIG).is_file() or not is_checkpoint:
        raise CheckpointError(
            f"{path} is neither a checkpoint (it would hold {CONFIG} and metadata.json) nor a run's folder with "
            f"{FOLDER}/{POINTER}"
        )
    return path


def read_position(folder: Path) -> dict | None:
    """Where the data stood when checkpoint `folder` was saved; None for one that has no steps behind it.

    Raises:
        CheckpointError: it is damaged.
    """
    file = folder / POSITION
    if not file.is_file():
        return None
    try:
        position = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(position, dict) or not {"step", "subsets"} <= position.keys():
        raise CheckpointError(f"{file} is damaged: it does not say where the data stands")
    return position


def require_average(folder: Path, cfg: RunConfig, average: bool) -> None:
    """Refuse `average` for a checkpoint that has no averaged weights.

    Raises:
        CheckpointError: its run had no averages.
    """
    if average and cfg.loss.reward != "ema":
        raise CheckpointError(f"{folder} has no averaged weights: its run had loss.reward={cfg.loss.reward}, not ema")


def failure(error: BaseException) -> BaseException:
    """What went wrong; torch wraps the errors of all ranks into one of its own, which is no Exception."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def unusable(path: str | Path, error: BaseException) -> CheckpointError:
    """One line for what a reader of checkpoint `path` ran into."""
    error = failure(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"checkpoint {path} cannot be loaded: {reason}")
