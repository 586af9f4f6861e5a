"""Evaluation: every input embedded once, spread over the data-parallel ranks, then each set's candidates ranked.

Used by tools/evaluate.py and by training.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import Side
from megatron_llave.config import RunConfig
from megatron_llave.data.evaluation_sets import EvaluationSet, read_evaluation
from megatron_llave.data.packing import build_encoder
from megatron_llave.embedding import LoadedModel, embed
from megatron_llave.report import SetResult
from megatron_llave.retrieval import overlap_coefficient, precision_at_1, rank_candidates

Scores = dict[str, float]
"""Set -> Precision@1 in percent."""

TOP_K = 5
"""Candidates per query that a result keeps."""


def evaluate(model: LoadedModel, inputs: dict[str, Side], sets: list[EvaluationSet]) -> list[SetResult]:
    """Precision@1 of every set, its similarities and the best candidates; the same result on every rank."""
    embeddings = embed(model, inputs)  # [inputs, d]
    row = {key: index for index, key in enumerate(inputs)}
    return [score(one, embeddings, row, model.groups.dp) for one in sets]


def build_evaluation(
    cfg: RunConfig, chunks: list[Module], groups: ProcessGroupCollection, progress: Callable[[str], None]
) -> Callable[[], Scores]:
    """A function that evaluates the model that is being trained, as it is, on the sets in evaluate.path.

    It tells `progress` of every row that it embeds.

    Raises:
        DataError: the sets, or a picture of theirs, cannot be read.
    """
    inputs, sets = read_evaluation(cfg.evaluate.path or cfg.data.path)
    model = LoadedModel(cfg, chunks, build_encoder(cfg.data, cfg.model), groups, progress)

    def run() -> Scores:
        for chunk in chunks:
            chunk.eval()
        results = evaluate(model, inputs, sets)
        for chunk in chunks:
            chunk.train()
        return {result.name: result.precision_at_1 for result in results}

    return run


def score(one: EvaluationSet, embeddings: Tensor, row: dict[str, int], group: dist.ProcessGroup) -> SetResult:
    """Rank one set, its candidates spread over the ranks of `group`.

    Args:
        one: the set.
        embeddings: [inputs, d], the same on every rank.
        row: input key -> row of `embeddings`.
        group: ranks that share the ranking.
    """
    queries = embeddings[[row[key] for key in one.queries]]
    share = torch.arange(len(one.candidates)).tensor_split(group.size())[group.rank()]
    candidates = embeddings[[row[one.candidates[index]] for index in share.tolist()]]
    positives = torch.tensor(one.positives, device=embeddings.device)
    first = int(share[0]) if len(share) else 0
    k = min(TOP_K, len(one.candidates))
    ranking = rank_candidates(queries, candidates, positives, k=k, offset=first, group=group)
    return SetResult(
        name=one.name,
        meta_task=one.meta_task,
        split=one.split,
        precision_at_1=precision_at_1(ranking, positives),
        chance=one.chance,
        num_queries=len(one.queries),
        num_candidates=len(one.candidates),
        overlap=overlap_coefficient(ranking.positive, ranking.hardest_negative),
        positive=ranking.positive.tolist(),
        hardest_negative=ranking.hardest_negative.tolist(),
        top=ranking.top.tolist(),
        positives=one.positives,
        queries=one.queries,
        candidates=one.candidates,
    )
