"""The folders of checkpoints: which one is current, which are complete, and which are kept.

    OUTPUT/checkpoints/step-0002400/    weights, optimizer, ... (state.py), config.yaml, data.json (position in the
                                        data), manifest.json (step, parallel layout, sizes, checksums)
    OUTPUT/checkpoints/latest           the name of the newest complete checkpoint

A checkpoint is written under a temporary name (async_writer.py), renamed when it is complete, and made current by
replacing `latest` atomically. A save that is killed leaves the previous checkpoint current.
"""

import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_llave.config.load import load_config, save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import AGAIN, VERSION, read_bytes, read_json, sha256_of, write_json, write_text
from megatron_llave.versions import program_versions

FOLDER = "checkpoints"
POINTER = "latest"
CONFIG = "config.yaml"
POSITION = "data.json"
MANIFEST = "manifest.json"
ASSETS = "assets"
"""Folder with the tokenizer and, for a converted model, with all that an export gives back (convert/hf.py). It is in
the output directory and in each checkpoint, where large files are hard links to those of the output directory."""
AVERAGE = "average."
"""Prefix of the names of averaged weights."""
FORMAT = "megatron_llave checkpoint"
BACKEND = "metadata.json"
"""megatron-core's file that tells how a checkpoint is stored."""
BACKEND_KEYS = {f"{part}_backend{kind}" for part in ("sharded", "common") for kind in ("", "_version")}
SECTIONS = ("model", "data", "loss", "optimizer", "train")
"""Sections of every configuration that was ever saved; those that embeddings depend on come before the last one."""
SMALL = 2**24
"""Largest number of bytes of a file whose contents the manifest has the SHA-256 of."""
_STEP = re.compile(r"step-(\d{7,15})")


class NoCheckpointError(CheckpointError):
    """A folder is not a checkpoint at all."""


def step_folder(output: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return Path(output) / FOLDER / f"step-{step:07d}"


def saved_config(folder: str | Path) -> RunConfig:
    """Return the configuration that a checkpoint was saved with, but its parallel layout."""
    return load_config(Path(folder) / CONFIG, leave_out=["parallel"])


def begin(partial: Path, cfg: RunConfig, position: dict | None) -> None:
    """Make a new checkpoint folder with everything except the tensors.

    Raises:
        OSError: the folder cannot be written.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_config(cfg, partial / CONFIG)
    if position is not None:
        write_json(partial / POSITION, position)
    assets = Path(cfg.train.output) / ASSETS
    if assets.is_dir():
        shutil.copytree(assets, partial / ASSETS, copy_function=link)


def finish(partial: Path, final: Path, step: int, layout: dict[str, int]) -> None:
    """Make a completely written checkpoint the current one.

    Raises:
        OSError: the disk is full; the previous checkpoint stays current.
    """
    write_manifest(partial, step, layout)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_to(final)


def write_manifest(folder: Path, step: int, layout: dict[str, int] | None, more: Mapping[str, Any] = {}) -> None:
    """Write what `require_complete` compares: size of every file, and SHA-256 of the small ones.

    Large files are only those with tensors, each of which has a checksum of its own (safe_reads.py).

    Args:
        folder: a checkpoint, complete but for its manifest.
        step: steps that were done.
        layout: the parallel layout that a run can resume at; None: a checkpoint of weights alone.
        more: further keys, such as that of merged_parts.py.
    """
    files = {str(path.relative_to(folder)): path for path in _files(folder) if path != folder / MANIFEST}
    sizes = {name: _size(path) for name, path in files.items()}
    hashes = {name: sha256_of(files[name]) for name, size in sizes.items() if size <= SMALL}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "layout": layout, "programs": program_versions()}
    write_json(folder / MANIFEST, {**manifest, **more, "files": sizes, "sha256": hashes})


def _point_to(final: Path) -> None:
    write_text(final.with_name(POINTER), final.name + "\n", only_writer=True)


def _size(path: Path) -> int:
    """Return the size in bytes as the file server knows it: another machine may have written the file just now."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove_old(output: str | Path, keep_last: int, keep_every: int, needed: Container[int] = ()) -> None:
    """Remove checkpoints that are not kept (config.schema.CheckpointConfig), and leftovers of killed saves.

    Checkpoints after the `needed` numbers of steps stay for now.

    Raises:
        OSError: a checkpoint cannot be removed.
    """
    folder = Path(output) / FOLDER
    steps = sorted(all_steps(output), reverse=True)
    for step in steps[keep_last:] if keep_last else []:
        if (not keep_every or step % keep_every) and step not in needed:
            # Rename it first, since a checkpoint that is half removed must not look like one.
            os.replace(step_folder(output, step), folder / f"step-{step:07d}.replaced")
    for left in (*folder.glob("step-*.replaced"), *folder.glob("step-*.partial")):
        shutil.rmtree(left)


def abandon_later(output: str | Path, folder: Path) -> list[Path]:
    """Rename those checkpoints of a run that are later than the one it goes back to.

    Otherwise they would count as newer than the checkpoints that the run is going to save.

    Args:
        output: output directory of the run.
        folder: the checkpoint that the run resumes from. If it is one of another run, nothing is renamed.

    Returns:
        The new folders: step-N.abandoned, or step-N.abandoned-2 and so on. Nothing is removed.
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
    """Return the steps of the checkpoints in an output directory, complete or not."""
    folder = Path(output) / FOLDER
    matches = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match[1]) for match in matches if match]


def newest_usable(output: str | Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint of a run; `report` is called with the problem of each newer one.

    It may be newer than the current checkpoint: a save that was killed just before its checkpoint was made current left
    a complete one.
    """
    for step in sorted(all_steps(output), reverse=True):
        folder = step_folder(output, step)
        try:
            require_complete(folder)
            return folder
        except CheckpointError as error:
            report(str(error))
    return None


def require_complete(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after comparing every file's size, and the contents of small files, with it.

    Raises:
        CheckpointError: names the file that is missing or is not the one that was written.
    """
    file = folder / MANIFEST
    hint = "the folder is not a checkpoint of a run, or not a complete one"
    manifest = read_json(file, FORMAT, hint, CheckpointError)
    try:
        files, step, hashes = dict(manifest["files"]), int(manifest["step"]), dict(manifest.get("sha256", {}))
        if (
            step < 0
            or not isinstance(manifest["layout"], dict | None)
            or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        ):
            raise ValueError("it names a step or a file that no checkpoint has")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__} {error}") from error
    for name, size in files.items():
        _require_same(folder, name, size, hashes.get(name))
    own = _STEP.fullmatch(folder.name) if folder.absolute().parent.name == FOLDER else None
    if own and int(own[1]) != step:
        raise CheckpointError(f"{file} is damaged: it is of step {step}")
    for name in (str(path.relative_to(folder)) for path in _files(folder)):
        is_read = (
            name in (CONFIG, POSITION, BACKEND) or name.startswith(f"{ASSETS}{os.sep}") or name.endswith(".distcp")
        )
        if is_read and name not in files:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not in {MANIFEST}; remove it")
    return manifest | {"step": step}


def _require_same(folder: Path, name: str, size: int, sha256: str | None) -> None:
    path = folder / name
    hint = "; instead of editing it, override its keys" if name == CONFIG else ""
    try:
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        actual = path.stat().st_size
        if actual != size:
            wrong = f"{name} has {actual} bytes, written were {size}"
            raise CheckpointError(f"checkpoint {folder} is damaged: {wrong}{hint}")
        if sha256 is not None and sha256_of(path) != sha256:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written (SHA-256){hint}")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {name} cannot be read: {error.strerror}") from error


def require_intact(folder: Path) -> dict[str, Any]:
    """Check a checkpoint by its manifest, without which only one of weights alone may be: merged or converted earlier.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the file that is missing or is not the one that was written.
    """
    of_run = (folder / POSITION).exists() or (_STEP.fullmatch(folder.name) and folder.absolute().parent.name == FOLDER)
    if of_run or (folder / MANIFEST).exists():
        manifest = require_complete(folder)
    else:
        manifest = {"step": 0, "layout": None}
        missing = [name for name in SECTIONS if f"\n{name}:" not in "\n" + _read_text(folder / CONFIG)]
        if missing:
            raise CheckpointError(f"{folder / CONFIG} is damaged: it is cut before {missing[0]}; {AGAIN}")
    backend = read_json(folder / BACKEND, error=CheckpointError)
    if backend.get("sharded_backend") != "torch_dist" or backend.keys() - BACKEND_KEYS:
        raise CheckpointError(f"{folder / BACKEND} is damaged: it does not describe a checkpoint in torch's format")
    return manifest


def _read_text(path: Path) -> str:
    return read_bytes(path, SMALL, error=CheckpointError).decode(errors="replace")


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Return a line `KEY was A, is B` for each value that differs between two nested dictionaries."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} was {old}, is {new}")
    return lines


def require_same_run(folder: Path, cfg: RunConfig) -> list[str]:
    """Check that a run with this configuration can resume from checkpoint `folder`.

    Returns:
        A line for each other key that differs, such as the learning rate; the value of `cfg` applies.

    Raises:
        CheckpointError: the model, its frozen parts, its adapters or loss.reward differ.
    """
    saved = saved_config(folder)
    model = differences(asdict(saved.model), asdict(cfg.model))
    changed = [f"model.{line}" for line in model if line.split()[0] not in ("preset", "kernels", "recompute")]
    lora = differences(asdict(saved.lora), asdict(cfg.lora))
    changed += [f"lora.{line}" for line in lora if line.split()[0] in ("rank", "alpha", "targets")]
    if saved.loss.reward != cfg.loss.reward:
        changed.append(f"loss.reward was {saved.loss.reward}, is {cfg.loss.reward}")
    if changed:
        hint = "resume with the same model, or start a new run from its weights with checkpoint.init"
        raise CheckpointError(f"checkpoint {folder} is of another model: {'; '.join(changed)}; {hint}")
    sections = ("lora", "loss", "optimizer", "train")
    data = differences(asdict(saved.data), asdict(cfg.data))
    return [f"data.{line}" for line in data if line.startswith("image_")] + [
        f"{section}.{line}"
        for section in sections
        for line in differences(asdict(getattr(saved, section)), asdict(getattr(cfg, section)))
    ]


def link(source: str, target: str) -> None:
    """Make a hard link, so that a large file is stored once, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def find(path: str | Path) -> Path:
    """Return the checkpoint folder at `path`: the folder itself, or the current checkpoint of an output directory.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; names the file.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; a checkpoint or a run's output directory is wanted")
    for folder in (path, path / FOLDER):
        if os.path.isfile(folder / POINTER):  # unlike Path.is_file, false for a name that no file can have
            name = _read_text(folder / POINTER).strip()
            if not _STEP.fullmatch(name):
                raise CheckpointError(f"{folder / POINTER} is damaged: it names {name!r}, not one such as step-0000100")
            path = folder / name
            break
    if not os.path.isfile(path / CONFIG) or not (path / BACKEND).exists():
        raise NoCheckpointError(
            f"{path} is neither a checkpoint (it would hold {CONFIG} and {BACKEND}) nor a run's folder with "
            f"{FOLDER}/{POINTER}"
        )
    require_intact(path)
    return path


def read_position(folder: Path) -> dict | None:
    """Return the position in the data at which checkpoint `folder` was saved, or None if it was saved before any step.

    Raises:
        CheckpointError: the file with the position is damaged.
    """
    file = folder / POSITION
    if not file.is_file():
        return None
    position = read_json(file, error=CheckpointError)
    step, subsets = position.get("step"), position.get("subsets")
    well_formed = isinstance(step, int) and isinstance(subsets, dict)
    if not well_formed or not all(isinstance(subset, dict) for subset in subsets.values()):
        raise CheckpointError(f"{file} is damaged: it does not say where the data stands")
    if os.path.isfile(folder / MANIFEST) and step != (saved := require_complete(folder)["step"]):
        raise CheckpointError(f"{file} is damaged: it is of step {step}, and the checkpoint of step {saved}")
    return position


def require_average(folder: Path, cfg: RunConfig, average: bool) -> None:
    """Refuse `average` for a checkpoint that has no averaged weights.

    Raises:
        CheckpointError: the run of the checkpoint kept no averages.
    """
    if average and cfg.loss.reward != "ema":
        raise CheckpointError(f"{folder} has no averaged weights: its run had loss.reward={cfg.loss.reward}, not ema")


def failure(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed; torch wraps those of all ranks into one, no Exception."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise a one-line CheckpointError for whatever occurs while checkpoint `path` is read inside.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # of many types; each means that the checkpoint is unusable
        raise unusable(path, error) from error


def unusable(path: str | Path, error: BaseException) -> CheckpointError:
    """Return a one-line CheckpointError for an error that occurred while checkpoint `path` was read."""
    error = failure(error)
    if isinstance(error, CheckpointError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    hint = "; the model section of the configuration is of another model" if "hape mismatch" in reason else ""
    return CheckpointError(f"checkpoint {path} cannot be loaded: {reason}{hint}")
