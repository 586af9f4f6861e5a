"""Retrieval on the user's own data: queries, a corpus, relevance judgements -> scores and a ranking in TREC's format.

Used by tools/evaluate.py retrieval. Queries and corpus are JSONL files as tools/embed.py takes; judgements are TREC's
qrels (query, 0, candidate, grade) or BEIR's table (query, candidate, grade, with a first line of names). The corpus is
embedded once into a folder and searched exactly, block by block from the disk, spread over all ranks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.cache import EmbeddingCache, EmbedParts, Identity, Progress, embed_missing
from megatron_llave.embedding.inputs import FileInput, FileInputs
from megatron_llave.embedding.jsonl import read_lines
from megatron_llave.errors import DataError
from megatron_llave.evaluation.metrics import parse_depths, score_ranking
from megatron_llave.evaluation.ranking import search
from megatron_llave.files import atomic_write, write_json

GRADE = re.compile(r"-?[0-9]+")
RANKING_FILE, SCORES_FILE = "ranking.trec", "scores.json"


@dataclass(frozen=True)
class Collection:
    """The lines of a JSONL file: inputs, and the id of each."""

    inputs: FileInputs
    ids: list[str]


@dataclass(frozen=True)
class RetrievalData:
    """What is searched for, in what, and what should be found."""

    queries: Collection
    corpus: Collection
    judgements: dict[str, dict[str, int]]


class StoredRows:
    """Rows [first, last) of a store, read from the disk slice by slice."""

    def __init__(self, store: EmbeddingCache, first: int, last: int) -> None:
        self.store, self.first, self.last = store, first, last

    def __len__(self) -> int:
        """Rows."""
        return self.last - self.first

    def __getitem__(self, index: slice) -> Tensor:
        """[n, d] float32."""
        return torch.from_numpy(self.store.rows(np.arange(self.first, self.last)[index]))


def read_retrieval(queries: str | Path, corpus: str | Path, judgements: str | Path) -> RetrievalData:
    """Read and check the three files.

    Raises:
        DataError: names file and line: malformed, an id twice or with white space, or one that does not exist.
    """
    found = [read_collection(path, name) for path, name in ((queries, "queries"), (corpus, "corpus"))]
    return RetrievalData(*found, read_judgements(judgements, *found))


def read_collection(path: str | Path, name: str) -> Collection:
    """The inputs of a JSONL file; see read_retrieval."""
    path, inputs, ids = Path(path), [], {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.id in ids:
            raise DataError(f"{path}:{number}: id {line.id!r} is that of line {ids[line.id]} too; ids must be unique")
        if not line.id or len(line.id.split()) != 1:
            raise DataError(f"{path}:{number}: id {line.id!r} must be without white space, as judgements have it")
        ids[line.id] = number
        inputs.append(FileInput(line.text, tuple(_relative(image, path.parent) for image in line.images), id=line.id))
    if not inputs:
        raise DataError(f"{path} has no lines")
    return Collection(FileInputs(name, inputs, path.parent, hint=f"they start from the folder of {path}"), list(ids))


def _relative(image: Path, folder: Path) -> str:
    return str(image.relative_to(folder) if image.is_relative_to(folder) else image)


def read_judgements(path: str | Path, queries: Collection, corpus: Collection) -> dict[str, dict[str, int]]:
    """Query id -> candidate id -> grade; see read_retrieval."""
    known = [(set(queries.ids), "query"), (set(corpus.ids), "candidate")]
    found: dict[str, dict[str, int]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at rarer characters too
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or (number == 1 and len(fields) == 3 and _is_name(fields[2])):
            continue
        if len(fields) not in (3, 4) or not GRADE.fullmatch(fields[-1]):
            right = "QUERY 0 CANDIDATE GRADE nor QUERY CANDIDATE GRADE with a whole number as grade"
            raise DataError(f"{path}:{number}: {line!r:.60} is neither {right}")
        query, candidate, grade = fields[0], fields[-2], int(fields[-1])
        for one, (ids, what) in zip((query, candidate), known):
            if one not in ids:
                raise DataError(f"{path}:{number}: no {what} has the id {one!r}")
        before = found.setdefault(query, {}).setdefault(candidate, grade)
        if before != grade:
            raise DataError(f"{path}:{number}: {query!r} and {candidate!r} have grade {grade} here and {before} before")
    if not any(grade > 0 for grades in found.values() for grade in grades.values()):
        raise DataError(f"{path} has no candidate with a grade above 0")
    return found


def _is_name(field: str) -> bool:
    """Of a column, and no grade, not even one that is written wrong, such as 1.0 or nan."""
    try:
        float(field)
    except ValueError:
        return field[0].isalpha()
    return False


def evaluate_retrieval(
    embed_parts: EmbedParts,
    data: RetrievalData,
    out: str | Path,
    identity: Identity,
    replicas: dist.ProcessGroup,
    depths: Sequence[int],
    progress: Progress = lambda what, done, total: None,
) -> dict[str, float]:
    """Embed what is not there yet, search, score; the first rank writes scores.json and ranking.trec into `out`.

    Args:
        embed_parts: of this rank's replica.
        data: see read_retrieval.
        out: folder for embeddings and results, shared by all ranks.
        identity: of the model; only the first rank's counts.
        replicas: data-parallel ranks that the embedding is dealt to; all ranks search.
        depths: k of recall and nDCG; max(depths) candidates per query are written.
        progress: told of each part.

    Returns:
        See relevance.score_ranking; the same on all ranks.
    """
    depths, out = parse_depths(depths), Path(out)
    stores = [
        EmbeddingCache(out / "embeddings" / collection.inputs.name, collection.inputs)
        for collection in (data.queries, data.corpus)
    ]
    embed_missing(embed_parts, stores, identity, replicas, progress)
    queries = torch.from_numpy(stores[0].rows(np.arange(len(data.queries.ids)))).to(device())
    world = dist.group.WORLD
    bounds = [len(data.corpus.ids) * rank // world.size() for rank in range(world.size() + 1)]
    first, last = bounds[world.rank()], bounds[world.rank() + 1]
    places, similarities = search(queries, StoredRows(stores[1], first, last), max(depths), first, world)
    ranking = {
        query: [data.corpus.ids[place] for place in row if place >= 0]
        for query, row in zip(data.queries.ids, places.tolist())
    }
    scores = score_ranking(ranking, data.judgements, depths)
    if dist.get_rank() == 0:
        _write(out, ranking, similarities.tolist(), scores)
    dist.barrier()
    return scores


def _write(out: Path, ranking: dict[str, list[str]], similarities: list[list[float]], scores: dict[str, float]) -> None:
    try:
        with atomic_write(out / RANKING_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
            for (query, candidates), row in zip(ranking.items(), similarities):
                for rank, (candidate, similarity) in enumerate(zip(candidates, row), start=1):
                    file.write(f"{query} Q0 {candidate} {rank} {similarity:.9g} megatron_llave\n")
        write_json(out / SCORES_FILE, scores)
    except OSError as error:
        raise DataError(f"{out}: the ranking cannot be written: {error.strerror}") from error
