"""Retrieval on the user's own queries, corpus and relevance judgements; writes scores and a ranking in TREC's format.

Queries and corpus are JSONL files as llave embed takes them. Judgements are TREC's qrels (query, 0, candidate,
grade) or BEIR's table (query, candidate, grade, with a first line of names). The corpus is embedded once into a folder
and searched exactly, block by block from disk, spread over all ranks.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import Side
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.embedding.jsonl import read_inputs
from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmark import Benchmark, Evaluate, Evaluation
from megatron_llave.evaluation.metrics import TIES_BY_INDEX, chance_scores, parse_depths, score_ranking
from megatron_llave.evaluation.ranking import search
from megatron_llave.files import atomic_write, read_lines, write_json
from megatron_llave.options import evaluate as options

GRADE = re.compile(r"-?[0-9]{1,9}")
RANKING_FILE, SCORES_FILE = "ranking.trec", "scores.json"
EXAMPLES, SHOWN = 8, 5
"""Number of queries in the report, and of their best candidates."""


@dataclass(frozen=True)
class Collection:
    """The inputs of a JSONL file, and their ids in the same order."""

    inputs: Inputs
    ids: list[str]

    def read(self, name: str) -> Side:
        """The input with this id, its images read."""
        return self.inputs[self.inputs.key(self.ids.index(name))]


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
    for number, line in read_inputs(path):
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
    for number, raw in read_lines(path):
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number} is not UTF-8 text") from error
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


def queries_in_corpus(data: RetrievalData) -> set[str]:
    """Ids of the queries that are candidates under the same id and that nobody judged relevant to themselves."""
    both = set(data.queries.ids) & set(data.corpus.ids)
    return {query for query in both if data.judgements.get(query, {}).get(query, 0) <= 0}


def queries_under_another_id(data: RetrievalData) -> list[str]:
    """Ids of the queries whose text and files are those of a candidate of another id that is not judged relevant."""
    contents = {item: name for item, name in zip(data.corpus.inputs.entries, data.corpus.ids)}
    return [
        query
        for item, query in zip(data.queries.inputs.entries, data.queries.ids)
        if contents.get(item, query) != query and data.judgements.get(query, {}).get(contents[item], 0) <= 0
    ]


def evaluate_retrieval(
    embedder: CachedEmbedder, data: RetrievalData, depths: Sequence[int], same_id: str = "leave_out"
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Embed the missing inputs, search and score; the first rank writes scores.json and ranking.trec.

    Equal similarities are ranked in the order of the corpus.

    Args:
        embedder: embeds the queries and the corpus; its folder gets the results. All ranks search.
        data: see read_retrieval.
        depths: values of k for recall@k and nDCG@k; max(depths) candidates per query are written.
        same_id: what happens to a query that is in the corpus under its own id (ArguAna, Quora, an image among images):
            leave_out takes it out of its own ranking, as BEIR and MTEB do, for it would always be found first; keep
            ranks it. A query whose judgements say that it is relevant to itself is always ranked.

    Returns:
        The best candidates of each query by their ids, and the scores of metrics.score_ranking; the same on all ranks.

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
    left_out = queries_in_corpus(data) if same_id == "leave_out" else set()
    k = min(max(depths) + bool(left_out), len(data.corpus.ids))
    places, similarities = search(queries, StoredRows(corpus_cache, first, last), k, first, world)
    ranking: dict[str, list[tuple[str, float]]] = {}
    for query, row, values in zip(data.queries.ids, places.tolist(), similarities.tolist()):
        found = [(data.corpus.ids[place], value) for place, value in zip(row, values) if place >= 0]
        found = [(name, value) for name, value in found if name != query or query not in left_out]
        ranking[query] = found[: max(depths)]
    names = {query: [name for name, _ in found] for query, found in ranking.items()}
    scores = score_ranking(names, data.judgements, depths)
    if dist.get_rank() == 0:
        counts = {
            "queries_left_out_of_their_own_ranking": len(left_out),
            "queries_in_corpus_under_another_id": len(queries_under_another_id(data)),
        }
        _write(Path(embedder.folder), ranking, {**counts, "chance": chance_of(data, depths, same_id), **scores})
    dist.barrier()
    return names, scores


def chance_of(data: RetrievalData, depths: Sequence[int], same_id: str) -> dict[str, float]:
    """Expected scores of a random order of the candidates, in percent (metrics.chance_scores)."""
    left_out = queries_in_corpus(data) if same_id == "leave_out" else set()
    num_candidates = {query: len(data.corpus.ids) - (query in left_out) for query in data.queries.ids}
    return chance_scores(data.judgements, num_candidates, depths)


def _write(out: Path, ranking: dict[str, list[tuple[str, float]]], scores: dict[str, Any]) -> None:
    try:
        with atomic_write(out / RANKING_FILE) as partial, open(partial, "w", encoding="utf-8") as file:
            for query, found in ranking.items():
                for rank, (candidate, similarity) in enumerate(found, start=1):
                    file.write(f"{query} Q0 {candidate} {rank} {similarity:.9g} megatron_llave\n")
        write_json(out / SCORES_FILE, {"ties": TIES_BY_INDEX, **scores})
    except OSError as error:
        raise DataError(f"{out}: the ranking cannot be written: {error.strerror}") from error


def _same_inputs(data: RetrievalData, same_id: str) -> list[str]:
    """Lines about queries that are in the corpus under the same id, and about those that are there under another id."""
    lines, both, again = [], queries_in_corpus(data), queries_under_another_id(data)
    if both:
        what = "are left out of their own ranking" if same_id == "leave_out" else "can find themselves"
        candidates = dict(zip(data.corpus.ids, data.corpus.inputs.entries))
        queries = zip(data.queries.ids, data.queries.inputs.entries)
        num_other = sum(query in both and candidates[query] != item for query, item in queries)
        other = f"; {num_other} of them have other content there: is it the same thing?" if num_other else ""
        lines.append(f"{len(both)} queries are in the corpus under the same id and {what} (--same-id){other}")
    if again:
        lines.append(
            f"{len(again)} queries are in the corpus under another id, {again[0]!r} is the first; they are ranked"
        )
    return lines


def _read_evaluation(args: argparse.Namespace) -> Evaluate:
    depths, data = parse_depths(args.k), read_retrieval(args.queries, args.corpus, args.judgements)

    def evaluate(embedder: CachedEmbedder) -> Evaluation:
        ranking, scores = evaluate_retrieval(embedder, data, depths, args.same_id)
        chance = chance_of(data, depths, args.same_id)
        table = [f"{name:>14} {score:6.2f} %   (chance {chance[name]:.2f} %)" for name, score in scores.items()]
        rows = [(name, f"{score:.2f}", f"{chance[name]:.2f}") for name, score in scores.items()]
        notes = [*_same_inputs(data, args.same_id), f"ties: {TIES_BY_INDEX}"]
        examples = _examples(data, ranking) if dist.get_rank() == 0 else []
        return Evaluation([*table, *notes, f"scores, ranking and report: {args.out}"], rows, examples)

    return evaluate


def _examples(data: RetrievalData, ranking: dict[str, list[str]]) -> list[tuple[Side, list[tuple[Side, bool]]]]:
    """Read EXAMPLES judged queries, evenly spread, and their SHOWN best candidates."""
    judged = [query for query in data.queries.ids if any(g > 0 for g in data.judgements.get(query, {}).values())]
    count = min(EXAMPLES, len(judged))
    chosen = [judged[number * len(judged) // count] for number in range(count)]
    return [
        (
            data.queries.read(query),
            [(data.corpus.read(name), data.judgements[query].get(name, 0) > 0) for name in ranking[query][:SHOWN]],
        )
        for query in chosen
    ]


BENCHMARK = Benchmark(
    **vars(options.RETRIEVAL),
    read_evaluation=_read_evaluation,
)
