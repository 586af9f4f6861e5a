"""Retrieval on the user's own queries, corpus and relevance judgements; writes scores and a ranking in TREC's format.

Queries and corpus are JSONL files as tools/embed.py takes them. Judgements are TREC's qrels (query, 0, candidate,
grade) or BEIR's table (query, candidate, grade, with a first line of names). The corpus is embedded once into a folder
and searched exactly, block by block from disk, spread over all ranks.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.embedding.jsonl import read_lines
from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmark import Benchmark, Evaluate, comma_list
from megatron_llave.evaluation.metrics import TIES_BY_INDEX, parse_depths, score_ranking
from megatron_llave.evaluation.ranking import search
from megatron_llave.files import atomic_write, write_json

GRADE = re.compile(r"-?[0-9]+")
RANKING_FILE, SCORES_FILE = "ranking.trec", "scores.json"


@dataclass(frozen=True)
class Collection:
    """The inputs of a JSONL file, and their ids in the same order."""

    inputs: Inputs
    ids: list[str]


@dataclass(frozen=True)
class RetrievalData:
    """Queries, the corpus that is searched, and the relevance judgements."""

    queries: Collection
    corpus: Collection
    judgements: dict[str, dict[str, int]]
    """Query id -> candidate id -> grade."""


class StoredRows:
    """Rows [first, last) of a cache, read from disk slice by slice."""

    def __init__(self, cache: EmbeddingCache, first: int, last: int) -> None:
        self.cache, self.first, self.last = cache, first, last

    def __len__(self) -> int:
        """Number of rows."""
        return self.last - self.first

    def __getitem__(self, index: slice) -> Tensor:
        """The rows of a slice, [n, d] float32."""
        return torch.from_numpy(self.cache.rows(np.arange(self.first, self.last)[index]))


def read_retrieval(queries: str | Path, corpus: str | Path, judgements: str | Path | None = None) -> RetrievalData:
    """Read and check the three files; without judgements, the candidate with the id of a query is its only right one.

    The default id is the number of the line, so that line i of the queries then belongs to line i of the corpus.

    Raises:
        DataError: a line is malformed, an id is not unique, has white space or is unknown; names file and line.
    """
    collections = read_collection(queries, "queries"), read_collection(corpus, "corpus")
    if judgements is None:
        return RetrievalData(*collections, _judge_equal_ids(queries, corpus, *collections))
    return RetrievalData(*collections, read_judgements(judgements, *collections))


def _judge_equal_ids(
    path: str | Path, corpus_path: str | Path, queries: Collection, corpus: Collection
) -> dict[str, dict[str, int]]:
    known = set(corpus.ids)
    for name in queries.ids:
        if name not in known:
            hint = "without --judgements each query needs the candidate that has its id"
            raise DataError(f"{path}: no candidate in {corpus_path} has the id {name!r}; {hint}")
    return {name: {name: 1} for name in queries.ids}


def read_collection(path: str | Path, name: str) -> Collection:
    """Read the inputs of a JSONL file under the name `name`; raises as read_retrieval does."""
    path, entries, ids = Path(path), [], {}
    for number, line in read_lines(path):
        if line.id in ids:
            raise DataError(f"{path}:{number}: id {line.id!r} is that of line {ids[line.id]} too; ids must be unique")
        if not line.id or len(line.id.split()) != 1:
            raise DataError(f"{path}:{number}: id {line.id!r} must be without white space, as judgements have it")
        ids[line.id] = number
        entries.append(line)
    if not entries:
        raise DataError(f"{path} has no lines")
    return Collection(Inputs(name, entries, path.parent, hint=f"they start from the folder of {path}"), list(ids))


def read_judgements(path: str | Path, queries: Collection, corpus: Collection) -> dict[str, dict[str, int]]:
    """Read query id -> candidate id -> grade; raises as read_retrieval does."""
    known = [(set(queries.ids), "query"), (set(corpus.ids), "candidate")]
    judgements: dict[str, dict[str, int]] = {}
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
        for given, (ids, what) in zip((query, candidate), known):
            if given not in ids:
                raise DataError(f"{path}:{number}: no {what} has the id {given!r}")
        before = judgements.setdefault(query, {}).setdefault(candidate, grade)
        if before != grade:
            raise DataError(f"{path}:{number}: {query!r} and {candidate!r} have grade {grade} here and {before} before")
    if not any(grade > 0 for grades in judgements.values() for grade in grades.values()):
        raise DataError(f"{path} has no candidate with a grade above 0")
    return judgements


def _is_name(field: str) -> bool:
    """Whether a field names a column; a malformed grade such as 1.0 or nan does not."""
    try:
        float(field)
    except ValueError:
        return field[0].isalpha()
    return False


def evaluate_retrieval(embedder: CachedEmbedder, data: RetrievalData, depths: Sequence[int]) -> dict[str, float]:
    """Embed the missing inputs, search and score; the first rank writes scores.json and ranking.trec.

    Equal similarities are ranked in the order of the corpus.

    Args:
        embedder: embeds the queries and the corpus; its folder gets the results. All ranks search.
        data: see read_retrieval.
        depths: values of k for recall@k and nDCG@k; max(depths) candidates per query are written.

    Returns:
        The scores of metrics.score_ranking; the same on all ranks.

    Raises:
        ConfigError: a depth is below 1.
        DataError: see CachedEmbedder.embed, or the results cannot be written.
    """
    depths = parse_depths(depths)
    query_cache, corpus_cache = embedder.embed([data.queries.inputs, data.corpus.inputs])
    queries = torch.from_numpy(query_cache.rows(np.arange(len(data.queries.ids)))).to(device())
    world = dist.group.WORLD
    bounds = [len(data.corpus.ids) * rank // world.size() for rank in range(world.size() + 1)]
    first, last = bounds[world.rank()], bounds[world.rank() + 1]
    places, similarities = search(queries, StoredRows(corpus_cache, first, last), max(depths), first, world)
    ranking = {
        query: [data.corpus.ids[place] for place in row if place >= 0]
        for query, row in zip(data.queries.ids, places.tolist())
    }
    scores = score_ranking(ranking, data.judgements, depths)
    if dist.get_rank() == 0:
        _write(Path(embedder.folder), ranking, similarities.tolist(), scores)
    dist.barrier()
    return scores


def _write(out: Path, ranking: dict[str, list[str]], similarities: list[list[float]], scores: dict[str, float]) -> None:
    try:
        with atomic_write(out / RANKING_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
            for (query, candidates), row in zip(ranking.items(), similarities):
                for rank, (candidate, similarity) in enumerate(zip(candidates, row), start=1):
                    file.write(f"{query} Q0 {candidate} {rank} {similarity:.9g} megatron_llave\n")
        write_json(out / SCORES_FILE, {"ties": TIES_BY_INDEX, **scores})
    except OSError as error:
        raise DataError(f"{out}: the ranking cannot be written: {error.strerror}") from error


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--queries", required=True, help="JSONL of {id, text, image}, as tools/embed.py takes (docs/data.md)"
    )
    parser.add_argument("--corpus", required=True, help="JSONL of the candidates, likewise")
    default = "default: a candidate with the id of the query (by default the number of its line) is right"
    parser.add_argument("--judgements", help=f"TREC qrels (query 0 candidate grade) or BEIR's table; {default}")
    parser.add_argument("--k", type=comma_list, default="1,5,10", help="depths of recall@k and ndcg@k; default: 1,5,10")


def _read_evaluation(args: argparse.Namespace) -> Evaluate:
    depths, data = parse_depths(args.k), read_retrieval(args.queries, args.corpus, args.judgements)

    def evaluate(embedder: CachedEmbedder) -> list[str]:
        scores = evaluate_retrieval(embedder, data, depths)
        table = [f"{name:>14} {score:6.2f} %" for name, score in scores.items()]
        return [*table, f"ties: {TIES_BY_INDEX}", f"scores and ranking: {args.out}"]

    return evaluate


BENCHMARK = Benchmark(
    name="retrieval",
    about="your own queries, corpus and relevance judgements",
    add_options=_add_options,
    read_evaluation=_read_evaluation,
)
