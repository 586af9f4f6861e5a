"""Scores a task: ranks each query's candidates, and applies the tie rule.

Every Precision@1 of an evaluation set comes from `score_task`. Retrieval from a corpus and of videos has other metrics
(metrics.py) and states their rule for ties, TIES_BY_INDEX, beside its scores.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.batch import to_device
from megatron_llave.distributed.collectives import all_gather_rows, row_counts
from megatron_llave.distributed.process_groups import device
from megatron_llave.evaluation.ranking import Ranking, alignment, hub_share, rank_candidates, uniformity
from megatron_llave.evaluation.task import SetResult, Task
from megatron_llave.loss.similarities import mean_margin, order_auc, overlap_coefficient

TOP_K = 5
"""Number of candidates per query that a result keeps."""
SAMPLE = 2000
"""Largest number of candidates that uniformity is measured on."""

Rows = Callable[[np.ndarray], np.ndarray]
"""Maps numbers of inputs [n] to their embeddings [n, d] float32."""


def score_task(task: Task, rows: Rows, ties: str, group: dist.ProcessGroup) -> SetResult:
    """Rank the candidates of every query, the work spread over the ranks of `group`; all of them get the same result.

    Args:
        task: what to score.
        rows: embeddings of the task's inputs.
        ties: a key of TIES. The right candidate given twice is no tie.
        group: ranks that share the work.
    """
    ranking = _rank_shared(task, rows, group) if task.bounds is None else _rank_own(task, rows, group)
    positive, hardest, top = ranking.positive.cpu(), ranking.hardest_negative.cpu(), ranking.top.cpu()
    is_tie = positive == hardest
    is_right = (positive > hardest) | (is_tie & (ties == "first"))
    shown = np.unique(np.concatenate([task.all_right.reshape(-1), top[top >= 0].numpy()]))
    place = {int(number): index for index, number in enumerate(shown)}
    candidates = task.candidates if task.bounds is None else np.unique(task.candidates)
    sample = candidates[np.linspace(0, len(candidates) - 1, min(SAMPLE, len(candidates))).round().astype(int)]
    spread = uniformity(torch.from_numpy(rows(sample)))
    return SetResult(
        name=task.name,
        meta_task=task.meta_task,
        split=task.split,
        precision_at_1=100.0 * int(is_right.sum()) / len(is_right),
        chance=task.chance,
        num_queries=len(is_right),
        num_candidates=task.num_candidates,
        overlap=overlap_coefficient(positive, hardest),
        margin=_finite(mean_margin(positive, hardest)),
        auc=_finite(order_auc(positive, hardest)),
        alignment=alignment(positive),
        uniformity=_finite(spread),
        hub_share=hub_share(top[:, 0]),
        num_ties=int(is_tie.sum()),
        positive=positive.tolist(),
        hardest_negative=hardest.tolist(),
        top=[[place.get(number, -1) for number in row] for row in top.tolist()],
        positives=[place[number] for number in task.right.tolist()],
        further=[] if task.further is None else [sorted({place[n] for n in row}) for row in task.further.tolist()],
        queries=[task.inputs.key(number) for number in task.queries.tolist()],
        candidates=[task.inputs.key(number) for number in shown.tolist()],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rank_shared(task: Task, rows: Rows, group: dist.ProcessGroup) -> Ranking:
    """Rank with the shared candidates spread over the ranks; `top` holds numbers of inputs."""
    share = np.array_split(np.arange(len(task.candidates)), group.size())[group.rank()]
    labels = task.candidates[share]
    queries, candidates, right, labels = map(_tensor, (rows(task.queries), rows(labels), task.all_right, labels))
    first = int(share[0]) if len(share) else 0
    ranking = rank_candidates(queries, candidates, right, TOP_K, first, group, labels=labels)
    top = _tensor(task.candidates)[ranking.top].masked_fill(ranking.top < 0, -1)
    return Ranking(top, ranking.positive, ranking.hardest_negative)


def _rank_own(task: Task, rows: Rows, group: dist.ProcessGroup) -> Ranking:
    """Rank each query's own candidates, the queries spread over the ranks; `top` holds numbers of inputs."""
    top, similarities = [], []
    for query in np.array_split(np.arange(len(task.queries)), group.size())[group.rank()].tolist():
        candidates = task.candidates_of(query)
        vectors = _tensor(rows(np.concatenate([task.queries[query : query + 1], candidates])))
        right, labels = _tensor(task.all_right[query : query + 1]), _tensor(candidates)
        ranking = rank_candidates(vectors[:1], vectors[1:], right, TOP_K, labels=labels)
        top.append(labels[ranking.top].masked_fill(ranking.top < 0, -1))
        similarities.append(torch.stack([ranking.positive, ranking.hardest_negative], dim=1))
    top = torch.cat([torch.zeros(0, TOP_K, dtype=torch.int64, device=device()), *top])  # [queries of this rank, k]
    similarities = torch.cat([torch.zeros(0, 2, device=device()), *similarities])
    [counts] = row_counts(group, top)
    top, similarities = all_gather_rows(top, counts, group), all_gather_rows(similarities, counts, group)
    return Ranking(top, *similarities.unbind(1))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device())
