"""Writes a folder of mined negatives: data/mined_negatives.py has the format and reads it.

The manifest is written twice: first with what is mined and how, and "complete": false, and last with the files, the
counts and "complete": true. A command that was killed finds the first one and keeps the files that are finished, which
the same models, rules and shards would give again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llave.data.index import Index, Shard
from megatron_llave.data.mined_negatives import FORMAT, MANIFEST_FILE, REPORT_FILE
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.shards import NEGATIVES, pack_side, to_json_bytes, write_samples
from megatron_llave.data.storage import Storage
from megatron_llave.data.tar_members import find_samples
from megatron_llave.distributed.collectives import from_all_ranks
from megatron_llave.errors import DataError
from megatron_llave.files import VERSION, read_json, sha256_of, write_json
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.mined import Mined

MOST_OPEN = 256
"""Number of shards that a rank keeps open for the contents of the negatives, which may be in any of their subset's."""
DIGITS = 4
"""Decimal places of the similarities that are written: ranks that share a model in another way round differently."""

Plan = dict[str, Any]
"""What decides the files: models, rules and shards, as the manifest says it."""


def require_free(out: Path, plan: Plan, index: Index, overwrite: bool) -> bool:
    """Check that a folder may get the negatives of a plan, of which some keys may be missing, for an index.

    Returns:
        Whether it is complete, with the negatives of this plan.

    Raises:
        DataError: it holds complete negatives of another plan, which `overwrite` does not allow to replace, or another
            file in place of the manifest, or no manifest and files with the names of shards, as the data's own folder,
            or a report.
    """
    path = out / MANIFEST_FILE
    if not path.is_file() and any((out / name).exists() for name in _names_of(index)):
        raise DataError(f"{out} holds files with the names of shards but no {MANIFEST_FILE}; choose another --out")
    if not path.is_file() and (out / REPORT_FILE).exists():
        raise DataError(f"{out} holds a {REPORT_FILE} but no {MANIFEST_FILE}; choose another --out")
    before = read_json(path, FORMAT, "choose another --out") if path.is_file() else {}
    apart = [key for key in plan if before.get(key) != plan[key]]
    if before.get("complete") is True and apart and not overwrite:
        raise DataError(f"{out} holds negatives of other {', '.join(apart)}; choose another --out or pass --overwrite")
    return before.get("complete") is True and not apart


def claim(out: Path, plan: Plan, index: Index, overwrite: bool) -> bool:
    """Prepare the folder for the negatives of a plan; the first rank calls it, with the folder locked.

    Files of an interrupted mining of the same plan are kept, and those of another one removed.

    Returns:
        Whether the folder is complete, with the negatives of this plan.

    Raises:
        DataError: as `require_free`, or the manifest of another plan is malformed.
    """
    if require_free(out, plan, index, overwrite):
        return True
    path, names = out / MANIFEST_FILE, _names_of(index)
    if path.is_file():
        before = read_json(path, FORMAT)
        if all(before.get(key) == plan[key] for key in plan):
            return False
        try:
            names |= _files_of(before)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is malformed ({error}); choose another --out, or delete {out}") from error
    # The manifest of the new plan goes first, so that no file of the old one is ever taken for one of it.
    write_json(path, {"format": FORMAT, "version": VERSION, "complete": False, **plan, "files": sorted(names)})
    for name in (*names, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    return False


def _names_of(index: Index) -> set[str]:
    return {shard.file for subset in index.subsets.values() for shard in subset.shards}


def _files_of(manifest: dict[str, Any]) -> set[str]:
    """The names of the files that an earlier manifest may have, without folders."""
    shards = [shard for subset in manifest.get("subsets", {}).values() for shard in subset["shards"]]
    named = (*manifest.get("files", []), *(shard["file"] for shard in shards))
    return {Path(name).name for name in named if name.endswith(".tar")}


def write_subset(out: Path, folder: Path, inputs: SubsetInputs, mined: Mined) -> list[Shard]:
    """Write the files of a subset that are not there yet; a collective over all ranks, which share them.

    Args:
        out: a folder that `claim` has prepared.
        folder: the shards.
        inputs: the subset.
        mined: its negatives.

    Returns:
        The file of each shard, in their order.

    Raises:
        DataError: a negative cannot be read any more, or the disk is full.
    """
    reader = ShardReader(Storage(str(folder), None), MOST_OPEN)
    written = []
    for turn in range(0, len(inputs.shards), dist.get_world_size()):
        number = turn + dist.get_rank()
        if number < len(inputs.shards):
            path = out / inputs.shards[number].file
            written.append((number, _finished(path) or _write(_samples(inputs, number, mined, reader), path)))
        dist.barrier()  # no rank waits for another longer than a shard takes
    of_all = dict(from_all_ranks(written))
    return [of_all[number] for number in range(len(inputs.shards))]


def _write(samples: Iterator[tuple[str, dict[str, bytes]]], path: Path) -> Shard:
    try:
        return write_samples(samples, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _finished(path: Path) -> Shard | None:
    """The file of an interrupted mining, if it is there and whole."""
    try:
        with open(path, "rb") as file:
            pairs = len(find_samples(file, path))
        return Shard(path.name, pairs, path.stat().st_size, sha256_of(path))
    except (OSError, DataError):
        return None


def _samples(
    inputs: SubsetInputs, number: int, mined: Mined, reader: ShardReader
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of the sample of each pair of a shard."""
    for key, query_id, query in inputs.pairs[number]:
        negatives = mined.negatives[query] if query >= 0 else []
        found = [(target, mined.similarity[query, i]) for i, target in enumerate(negatives) if target >= 0]
        described: dict[str, Any] = {"subset": inputs.name, "query": query_id}
        if query >= 0 and mined.dropped[query]:
            described["dropped"] = True
        if query >= 0:
            positives = (round(float(value), DIGITS) + 0.0 for value in mined.positives[query])
            described["positives"] = dict(zip(("least", "mean", "most"), positives))
        entries, images = [], {}
        for place, (target, similarity) in enumerate(found):
            shard, pair_number, side_number = inputs.places[target].tolist()
            pair = reader.read(inputs.shards[shard], pair_number)
            side = (pair.targets + pair.hard_negatives)[side_number]
            entry, of_side = pack_side(side, f"negative.{place}.", f"pair {key}")
            similarity = round(float(similarity), DIGITS) + 0.0
            entries.append({"id": inputs.target_ids[target], **entry, "similarity": similarity})
            images |= of_side
        described[NEGATIVES] = entries
        yield key, {"json": to_json_bytes(described), **images}


def finish(
    out: Path, head: dict[str, Any], subsets: Sequence[tuple[SubsetInputs, Mined, list[Shard]]]
) -> dict[str, Any]:
    """Write the manifest that makes the folder complete, and return it; the first rank calls it.

    `head` is the plan, with what else is told of the models.
    """
    described = {
        inputs.name: {
            **mined.report,
            "shards": [{**asdict(shard), "of": of.sha256} for shard, of in zip(shards, inputs.shards)],
        }
        for inputs, mined, shards in subsets
    }
    manifest = {"format": FORMAT, "version": VERSION, "complete": True, **head, "subsets": described}
    try:
        write_json(out / MANIFEST_FILE, manifest)
    except OSError as error:
        raise DataError(f"{out / MANIFEST_FILE} cannot be written: {error.strerror or error}") from error
    return manifest


def read_complete(out: Path) -> dict[str, Any]:
    """Read the manifest of a complete folder."""
    return read_json(out / MANIFEST_FILE, FORMAT)
