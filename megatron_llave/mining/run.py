"""Mines the negatives of a folder of shards with one or several models, from embedding to the written files."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llave.config.mining import Rules, Search
from megatron_llave.config.redact import own_name
from megatron_llave.data.index import Index
from megatron_llave.data.stored_vectors import open_vectors
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.locks import lock_folder
from megatron_llave.mining import negatives_folder
from megatron_llave.mining.approximate import require_faiss
from megatron_llave.mining.inputs import read_subsets
from megatron_llave.mining.mined import mine_subset
from megatron_llave.mining.neighbours import NearestTargets
from megatron_llave.mining.store import data_digest, stored_embeddings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Mining:
    """What is to be mined and where it goes."""

    folder: Path
    """The local folder of shards."""
    index: Index
    """Its index."""
    subsets: Sequence[str]
    """The subsets that get negatives, each from its own targets."""
    out: Path
    """Folder for the negatives."""
    store: Path
    """Folder for embeddings, which are kept; all ranks share both folders."""
    checkpoints: Sequence[str]
    """The models, as the user names them."""
    rules: Rules
    search: Search = Search()
    """How the nearest targets are found."""
    overwrite: bool = False
    """Whether complete negatives of another plan are replaced."""


def mine(mining: Mining, models: Sequence[Callable[[], LoadedModel]], say: Say = lambda doing: None) -> dict[str, Any]:
    """Mine and write the negatives; a collective over all ranks, with the same result at every layout.

    Args:
        mining: what is mined.
        models: load mining.checkpoints, whose rules vote, one after the other.
        say: called with what is being done.

    Returns:
        The manifest, on the first rank; on the others it is empty.

    Raises:
        DataError: see negatives_folder.claim, store.stored_embeddings and inputs.read_subsets.
        ConfigError: FAISS is asked for and cannot be imported.
    """
    data = {"sha256": data_digest(mining.index), "subsets": list(mining.subsets)}
    plan = {"rules": asdict(mining.rules), "search": mining.search.plan, "data": data}
    if mining.search.kind == "faiss":
        require_faiss()  # before hours of embedding
    model = models[0]()  # which joins the ranks
    with lock_folder(mining.out) if dist.get_rank() == 0 else nullcontext():
        from_first_rank(
            lambda: negatives_folder.require_free(mining.out, plan, mining.index, mining.overwrite)
        )  # before embedding
        names, identities, files = [], [], []
        for number in range(len(models)):
            if number:
                del model  # there need be room for one only
                model = models[number]()
            say(f"embedding with model {number + 1} of {len(models)}")
            names.append(label(mining.checkpoints[number], model.source.place))
            identities.append(from_first_rank(model.identity))
            files.append(stored_embeddings(model, mining.folder, mining.index, mining.store))
        plan = {"models": identities, **plan}
        is_complete = from_first_rank(lambda: negatives_folder.claim(mining.out, plan, mining.index, mining.overwrite))
        if is_complete:
            say("nothing: the negatives are complete already")
            return negatives_folder.read_complete(mining.out) if dist.get_rank() == 0 else {}
        vectors = [open_vectors(file) for file in files]
        written = []
        for inputs in read_subsets(mining.folder, mining.index, mining.subsets, vectors):
            say(f"searching for negatives of subset {inputs.name}")
            found = [NearestTargets(inputs, of_model, mining.rules.depth, mining.search) for of_model in vectors]
            mined = mine_subset(inputs, found, mining.rules)
            mined.report |= recall_of(found)
            del found  # and its targets, before files are written
            say(f"writing the negatives of subset {inputs.name}")
            written.append((inputs, mined, negatives_folder.write_subset(mining.out, mining.folder, inputs, mined)))
        if dist.get_rank() != 0:
            return {}
        return negatives_folder.finish(mining.out, {"checkpoints": names, **plan}, written)


def recall_of(found: Sequence[NearestTargets]) -> dict[str, list[float]]:
    """What the report of a subset says of approximate searches: `recall` of each model; nothing of exact ones."""
    measured = [round(one.recall, 4) for one in found if one.recall is not None]
    return {"recall": measured} if measured else {}


def label(given: str, place: str) -> str:
    """What the manifest calls a model: the name of the folder that was given, and of the checkpoint found in it."""
    name, found = own_name(given), own_name(place)
    return name if name == found else f"{name} ({found})"
