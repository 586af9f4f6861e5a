"""The embeddings that mining works on: one file of each model and data set in a folder that is kept between commands.

A file is what llave embed --shards writes, and its name is a hash of the model and of the shards. So an interrupted
command continues, other rules need no new embeddings, and those of another model or of changed shards are never taken.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_llave.data.index import Index
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.embedding.shard_inputs import SHARD_BLOCK, count_shard_inputs, read_shard_blocks
from megatron_llave.embedding.whole_files import Source, embed_into_file
from megatron_llave.files import write_json

logger = logging.getLogger(__name__)


def data_digest(index: Index) -> str:
    """SHA-256 of what the index says of the shards."""
    return hashlib.sha256(json.dumps(asdict(index), sort_keys=True).encode()).hexdigest()


def stored_embeddings(model: LoadedModel, folder: str | Path, index: Index, store: str | Path) -> Path:
    """Return the file with the embeddings of all inputs of a folder of shards, which are embedded where it is missing.

    A collective over all ranks.

    Args:
        model: the model.
        folder: the local folder of shards, with their index.
        index: the folder's index.
        store: folder for the files, which all ranks share.

    Raises:
        DataError: as embedding.whole_files.embed_into_file does; an input that cannot be read is left out, with a
            warning.
    """
    identity = from_first_rank(model.identity)
    data = data_digest(index)
    name = hashlib.sha256(json.dumps([identity, data], sort_keys=True).encode()).hexdigest()[:16]
    out = Path(store) / f"{name}.npy"
    if from_first_rank(out.is_file):
        return out
    num_rows, _ = count_shard_inputs(folder)
    blocks = partial(read_shard_blocks, folder, SHARD_BLOCK)
    done = embed_into_file(model, Source(str(folder), blocks, SHARD_BLOCK, num_rows, name, skip_bad=True), out)
    if dist.get_rank() == 0:
        if done.skipped:
            what = f"{len(done.skipped)} of {num_rows} inputs cannot be embedded, and their pairs get no negatives"
            logger.warning("%s: %s.skipped.jsonl", what, out)
        write_json(out.with_suffix(".json"), {"model": identity, "data": str(folder), "data_sha256": data})
    dist.barrier()
    return out
