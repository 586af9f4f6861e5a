"""Builds the index of a folder of images and brings it up to date.

1. Find the files (scan.py); hash those that are new or whose size or time has changed.
2. Embed each content that has no vector yet. All ranks do, in parts that stay in INDEX/building: a build that was
   interrupted loses at most the part that each rank was embedding, also if the folder has changed meanwhile.
3. Write the new index beside the old one, and then the manifest (index.py).
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pyarrow.parquet as pq
import torch.distributed as dist

from megatron_llave.batch import Side
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.embedding.cache import MANIFEST as CACHE_MANIFEST
from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache, require_same_model
from megatron_llave.embedding.embedder import LoadedModel, embed_parts, load_model, read_identity
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError, require
from megatron_llave.files import atomic_write, read_json, write_text
from megatron_llave.locks import WRITER_FILE, lock_folder
from megatron_llave.search.index import (
    FILES,
    FOLDER,
    MANIFEST,
    NO_ROW,
    SCHEMA,
    ImageIndex,
    Manifest,
    open_index,
    read_files,
    remove_old,
    write_files,
    write_index,
)
from megatron_llave.search.prompts import default_prompts
from megatron_llave.search.scan import UNKNOWN_TIME, ImageFile, scan_folder, with_digests

BUILDING = "building"
"""Folder of what is embedded and not yet in the index, one folder for each build that began."""
UNREADABLE = "unreadable.jsonl"
"""File that lists what cannot be read, and why."""
BLOCK = 4096
"""Vectors that are copied at a time."""
Progress = Callable[[str, int, int], None]
"""Called with what is done, the number done, and the number of all."""
Vectors = Callable[[np.ndarray], np.ndarray]
"""Returns the vectors [k, d] with these numbers [k]."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build; None: as the index has it, or the default for a new one."""

    pictures: Path
    index: Path
    checkpoint: str
    overrides: tuple[str, ...] = ()
    average: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    """Prompts other than the index's own, by name."""
    vectors: str | None = None
    dims: int | None = None
    rebuild: bool = False
    """Whether to embed all images again, whatever the index holds."""


@dataclass
class Built:
    """What a build has done, on the first rank."""

    manifest: Manifest
    new: int = 0
    changed: int = 0
    removed: int = 0
    """Files."""
    embedded: int = 0
    """Images that were embedded now."""
    kept: int = 0
    """Images embedded by an earlier build that was interrupted."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Files and folders that cannot be read, and why."""
    others: dict[str, int] = field(default_factory=dict)
    """Files that are no images by their names, by ending."""
    is_written: bool = True
    """Whether there was anything to write."""
    notes: list[str] = field(default_factory=list)


class ImagesOf(Inputs):
    """Image files with the prompt of the index; the bytes must be those that were hashed."""

    def __getitem__(self, key: str) -> Side:
        """The input of a key.

        Raises:
            DataError: the file cannot be read, or has changed.
        """
        side = super().__getitem__(key)
        if hashlib.sha256(side.images[0]).hexdigest() != self.entries[self.index(key) - self.first].id:
            raise DataError("it changed while the index was built; the next build reads it")
        return side


def images_of(files: Sequence[ImageFile], folder: str | Path, prompt: str) -> ImagesOf:
    """The model's inputs of these files."""
    text = mark_user_text(prompt, 1)
    return ImagesOf("images", [Input(text, (file.name,), id=file.digest.hex()) for file in files], folder)


@dataclass
class _Plan:
    """What the first rank has found."""

    manifest: Manifest
    """Of the index to write, as far as it is known."""
    old: ImageIndex | None
    files: list[ImageFile]
    missing: list[ImageFile]
    """One file of each content that has no vector."""
    places: dict[bytes, tuple[Vectors, int]]
    """Where the vector of a content is: what returns it, and its number."""
    kept: int
    built: Built


def build_index(options: BuildOptions, progress: Progress = lambda what, done, total: None) -> Built | None:
    """Build or update an index; under torchrun all ranks call it and embed. Returns what was done on the first rank.

    Raises:
        UserError: the folder of images or the checkpoint cannot be used, the index is of another model, another process
            is building it, or the disk is full.
    """
    is_first, is_alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    require_index_or_empty(options.index)
    with lock_folder(options.index, f"index {options.index}") if is_first else nullcontext():
        plan = _make_plan(options, progress) if is_first else None
        # The weights of the plan, and not those that a running training has saved since; other ranks take the first's.
        checkpoint = plan.manifest.checkpoint if plan else options.checkpoint
        load = partial(load_model, checkpoint, options.overrides, options.average)
        model = None if is_alone else load()
        missing = plan.missing if is_alone else from_first_rank(lambda: plan.missing)
        if missing:
            model = model or load()
            prompt = plan.manifest.prompts.image if is_alone else from_first_rank(lambda: plan.manifest.prompts.image)
            inputs = images_of(missing, options.pictures, prompt)
            identity = _identity_of_parts(plan.manifest) if is_first else {}
            cache = _embed(model, options.index, inputs, identity, progress)
        if is_first:
            if missing:
                _add_embedded(plan, model, inputs, cache)
            _publish(plan, options, progress)
        if not is_alone:
            dist.barrier()
    return plan.built if is_first else None


def require_index_or_empty(folder: Path) -> None:
    """Raise a DataError where a folder holds something else than an index."""
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        own = {BUILDING, WRITER_FILE, UNREADABLE}
        foreign = [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(FOLDER)]
        if foreign:
            raise DataError(f"{folder} is no index and holds other files ({foreign[0]}); choose another --out")


def _make_plan(options: BuildOptions, progress: Progress) -> _Plan:
    cfg, identity, checkpoint = read_identity(options.checkpoint, options.overrides, options.average)
    has_old = (options.index / MANIFEST).is_file() and not options.rebuild
    old = open_index(options.index) if has_old else None
    before = old.manifest if old else None
    manifest = replace(_describe(options, cfg, identity, before), checkpoint=os.path.abspath(checkpoint))
    if before is not None:
        path, hint = options.index / MANIFEST, "--rebuild embeds all images again; or choose another --out"
        require_same_model(path, _identity_of_parts(before), _identity_of_parts(manifest), hint)
    scan = scan_folder(options.pictures, [options.index])
    if before is not None and before.files and not scan.files:
        hint = f"is it mounted? --rebuild empties {options.index}"
        raise DataError(f"{options.pictures} holds no image now, and its index has {before.files} files; {hint}")
    known = {file.path: file for file in old.files} if old else {}
    hashed = with_digests(
        options.pictures, scan.files, known, lambda done: progress("reading files", done, len(scan.files))
    )
    refused = {f.digest: f.problem for f in known.values() if f.digest and f.problem}
    refused = refused if before is not None and before.decoder == manifest.decoder else {}
    files = [replace(file, problem=refused[file.digest]) if file.digest in refused else file for file in hashed]
    places = (
        {} if old is None else {digest: (old.vectors.__getitem__, row) for digest, row in old.row_of_digest.items()}
    )
    kept = _find_kept(options.index / BUILDING, options.pictures, manifest)  # also of a rebuild that was interrupted
    wanted = {file.digest: file for file in reversed(files) if not file.problem}
    used = {digest: place for digest, place in kept.items() if digest in wanted and digest not in places}
    places |= used
    missing = sorted((file for digest, file in wanted.items() if digest not in places), key=lambda file: file.path)
    built = Built(manifest, kept=len(used), problems=list(scan.folder_problems), others=dict(scan.others))
    _count_changes(built, known, files)
    trained = cfg.loss.matryoshka_dims
    if manifest.dims and manifest.dims not in trained:
        lengths = f"for {', '.join(map(str, trained))} numbers" if trained else "without loss.matryoshka_dims"
        built.notes.append(f"the model was trained {lengths}, so that the first {manifest.dims} may say little")
    return _Plan(manifest, old, files, missing, places, len(used), built)


def _describe(options: BuildOptions, cfg: RunConfig, identity: dict[str, str], before: Manifest | None) -> Manifest:
    width = cfg.model.language.hidden_size
    prompts = before.prompts if before else default_prompts(cfg.data.prompt)
    vectors = options.vectors or (before.vectors if before else "float32")
    dims = options.dims if options.dims is not None else before.dims if before else 0
    require(0 <= dims <= width, f"--dims {dims} must be between 1 and the {width} numbers of the model's vectors")
    return Manifest(
        pictures=os.path.abspath(options.pictures),
        checkpoint="",
        model=identity,
        prompts=replace(prompts, **options.prompts),
        folder="",
        images=0,
        files=0,
        unreadable=0,
        width=width,
        sha256={},
        decoder=f"Pillow {PIL.__version__}",
        overrides=[item for item in options.overrides if not item.startswith("parallel.")],
        average=options.average,
        vectors=vectors,
        dims=0 if dims == width else dims,
    )


def _identity_of_parts(manifest: Manifest) -> dict[str, str]:
    """What the vectors depend on: the model and the text that goes with each image."""
    return {**manifest.model, "text of the images": manifest.prompts.image}


def _count_changes(built: Built, known: dict[bytes, ImageFile], files: Sequence[ImageFile]) -> None:
    paths = {file.path for file in files}
    built.new = sum(file.path not in known for file in files)
    built.changed = sum(file.path in known and known[file.path].digest != file.digest for file in files)
    built.removed = sum(path not in paths for path in known)


def _find_kept(building: Path, pictures: Path, manifest: Manifest) -> dict[bytes, tuple[Vectors, int]]:
    """The vectors that interrupted builds with this model have left."""
    found: dict[bytes, tuple[Vectors, int]] = {}
    for folder in sorted(building.glob("*")) if building.is_dir() else ():
        try:
            files = read_files(pq.read_table(folder / FILES, schema=SCHEMA))
            cache = _cache_of(folder, images_of(files, pictures, manifest.prompts.image))
            recorded = read_json(cache.folder / CACHE_MANIFEST)
        except (OSError, ValueError):  # it was stopped before anything was embedded
            continue
        if recorded.get("model") != _identity_of_parts(manifest):
            continue
        absent = set(cache.missing())
        for part in range(cache.num_parts):
            numbers = np.arange(cache.bounds[part], cache.bounds[part + 1])
            if part not in absent:
                rows = cache.rows(numbers)
                for number in numbers[rows.any(axis=1)].tolist():
                    found[files[number].digest] = (cache.rows, number)
    return found


def _cache_of(folder: Path, inputs: Inputs) -> EmbeddingCache:
    return EmbeddingCache(folder / "embeddings" / inputs.name, inputs)


def _embed(
    model: LoadedModel, index: Path, inputs: Inputs, identity: dict[str, str], progress: Progress
) -> EmbeddingCache:
    """Embed the inputs on all ranks, each of which keeps its parts in one new folder."""
    name = from_first_rank(lambda: secrets.token_hex(4))
    folder = index / BUILDING / name
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True)
            with atomic_write(folder / FILES) as temporary:
                files = [ImageFile(os.fsencode(x.images[0]), 0, 0, bytes.fromhex(x.id)) for x in inputs.entries]
                write_files(temporary, files, range(len(files)))
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    embed = partial(embed_parts, model, skip_bad=True)
    embedder = CachedEmbedder(embed, folder, identity, model.groups.dp, progress, requires_files=False)
    (cache,) = embedder.embed([inputs])
    return cache


def _add_embedded(plan: _Plan, model: LoadedModel, inputs: ImagesOf, cache: EmbeddingCache) -> None:
    """Note where the new vectors are, and why images have none, which are read again for the reason."""
    keys, bad = list(inputs), {}
    for start in range(0, len(keys), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, len(keys)))
        has_vector = cache.rows(numbers).any(axis=1)
        for number, ok in zip(numbers.tolist(), has_vector.tolist()):
            digest = plan.missing[number].digest
            if ok:
                plan.places[digest] = (cache.rows, number)
            else:
                bad[digest] = _without_vector(model, inputs, keys[number], plan.missing[number])
    plan.built.embedded = len(keys) - len(bad)
    plan.files = [replace(bad[file.digest], path=file.path) if file.digest in bad else file for file in plan.files]


def _without_vector(model: LoadedModel, inputs: ImagesOf, key: str, file: ImageFile) -> ImageFile:
    """Return a file that could not be embedded with the reason; one that could not be read is tried again next time."""
    try:
        side = inputs[key]
    except DataError as error:
        reason = str(error).partition(f"input {file.digest.hex()!r}: ")[2] or str(error)
        return replace(file, problem=reason, digest=b"", mtime_ns=UNKNOWN_TIME)
    try:
        model.encoder.encode(side)
    except DataError as error:
        return replace(file, problem=str(error))
    return replace(file, problem="it can be read now; the next build does", digest=b"", mtime_ns=UNKNOWN_TIME)


def _publish(plan: _Plan, options: BuildOptions, progress: Progress) -> None:
    """Write the index where anything has changed; then remove what was kept for it."""
    built, files = plan.built, plan.files
    built.problems += [(file.name, file.problem) for file in files if file.problem]
    list_problems(options.index / UNREADABLE, built.problems)
    order = dict.fromkeys(file.digest for file in files if not file.problem)  # by first path
    digests = list(order)
    row_of = {digest: row for row, digest in enumerate(digests)}
    rows = [NO_ROW if file.problem else row_of[file.digest] for file in files]
    manifest = replace(plan.manifest, images=len(digests))
    if plan.old is not None and _is_same(plan.old, manifest, files):
        built.manifest, built.is_written = plan.old.manifest, False
        remove_old(options.index, built.manifest.folder)
    else:
        blocks = _blocks(digests, plan.places, manifest.width, progress)
        built.manifest = write_index(options.index, manifest, files, rows, blocks)
    shutil.rmtree(options.index / BUILDING, ignore_errors=True)


def list_problems(path: Path, problems: Sequence[tuple[str, str]]) -> None:
    """Write what cannot be read as JSON lines, or remove the file where there is nothing."""
    if not problems:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"file": name, "problem": problem}) + "\n" for name, problem in problems]
    write_text(path, "".join(lines), only_writer=True)


def _is_same(old: ImageIndex, manifest: Manifest, files: Sequence[ImageFile]) -> bool:
    names = ("pictures", "checkpoint", "prompts", "decoder", "overrides", "average", "vectors", "dims", "images")
    is_alike = all(getattr(old.manifest, name) == getattr(manifest, name) for name in names)
    return is_alike and old.files == list(files)


def _blocks(
    digests: Sequence[bytes], places: dict[bytes, tuple[Vectors, int]], width: int, progress: Progress
) -> Iterator[np.ndarray]:
    """Yield the vectors of the contents in order, BLOCK at a time."""
    for start in range(0, len(digests), BLOCK):
        chosen = [places[digest] for digest in digests[start : start + BLOCK]]
        block = np.empty((len(chosen), width), np.float32)
        sources = {id(read.__self__): read for read, _ in chosen}
        for source, read in sources.items():
            numbers = [number for number, (other, _) in enumerate(chosen) if id(other.__self__) == source]
            block[numbers] = read(np.array([chosen[number][1] for number in numbers]))
        progress("writing the index", min(start + BLOCK, len(digests)), len(digests))
        yield block
