"""Evaluation: every input embedded once, spread over the data-parallel ranks, then each set's candidates ranked.

Used by tools/evaluate.py and by training.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import Side
from megatron_llave.config.schema import RunConfig
from megatron_llave.embedding.cache import PART_COST
from megatron_llave.embedding.embedder import LoadedModel, embed, require_finite
from megatron_llave.embedding.inputs import FileInputs
from megatron_llave.errors import ConfigError, NotFiniteError
from megatron_llave.evaluation.benchmarks.mmeb import choose_sets, read_task
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, is_prepared, read_evaluation
from megatron_llave.evaluation.ranking import alignment, hub_share, precision_at_1, rank_candidates, uniformity
from megatron_llave.evaluation.scoring import score_task
from megatron_llave.evaluation.task import RankingTask, SetResult
from megatron_llave.loss.similarities import overlap_coefficient
from megatron_llave.models import build_processor

logger = logging.getLogger(__name__)

Scores = dict[str, float]
"""Set -> Precision@1 in percent; NaN where embeddings are not finite."""

TOP_K = 5
"""Candidates per query that a result keeps."""


def evaluate(model: LoadedModel, inputs: dict[str, Side], sets: list[EvaluationSet]) -> list[SetResult]:
    """Precision@1 of every set, its similarities and the best candidates; the same result on every rank.

    Raises:
        DataError: an input cannot be read, or its embedding is not finite.
    """
    embeddings = embed(model, inputs)  # [inputs, d]
    require_finite(embeddings, inputs)
    row = {key: index for index, key in enumerate(inputs)}
    return [score(one, embeddings, row, model.groups.dp) for one in sets]


def build_evaluation(
    cfg: RunConfig, chunks: list[Module], groups: ProcessGroupCollection, progress: Callable[[str], None]
) -> Callable[[], Scores]:
    """A function that evaluates the model that is being trained, as it is, on the sets in evaluate.path.

    It tells `progress` of every row that it embeds. Of a model whose embeddings are not finite it gives NaN for every
    set, with a warning: whether such a run goes on is for its steps to decide (train.max_bad_steps), not for a
    measurement.

    Raises:
        DataError: the sets, or a picture of theirs, cannot be read.
    """
    folder, names = Path(cfg.evaluate.path or cfg.data.path), cfg.evaluate.sets
    model = LoadedModel(cfg, chunks, build_processor(cfg.data, cfg.model), groups, progress)
    if is_prepared(folder):
        inputs, sets = read_evaluation(folder)
        sets = choose(sets, names, folder)
        used = {key: inputs[key] for one in sets for key in (*one.queries, *one.candidates)}
        evaluate_all, names = partial(evaluate, model, used, sets), [one.name for one in sets]
    else:
        images = cfg.evaluate.images or folder
        tasks = [read_task(folder, images, name) for name in choose_sets(folder, names, "evaluate.sets")]
        for task in tasks:
            task.inputs.require_files()
        evaluate_all, names = partial(evaluate_in_memory, model, tasks), [task.name for task in tasks]

    def run() -> Scores:
        for chunk in chunks:
            chunk.eval()
        try:
            scores = {result.name: result.precision_at_1 for result in evaluate_all()}
        except NotFiniteError as error:  # met by all ranks alike: each has all embeddings
            if dist.get_rank() == 0:
                logger.warning("no evaluation: %s", error)
            scores = dict.fromkeys(names, math.nan)
        for chunk in chunks:
            chunk.train()
        return scores

    return run


def choose(sets: list[EvaluationSet], names: list[str], folder: Path) -> list[EvaluationSet]:
    """The sets that are named, or all.

    Raises:
        ConfigError: one is not there.
    """
    found = {one.name: one for one in sets}
    for name in names:
        if name not in found:
            raise ConfigError(f"evaluate.sets: {name!r} is none of the sets in {folder}: {', '.join(found)}")
    return [found[name] for name in names] or sets


def evaluate_in_memory(model: LoadedModel, tasks: list[RankingTask]) -> list[SetResult]:
    """Score ranking tasks without keeping anything on disk; the same result on every rank.

    Raises:
        DataError: an input cannot be read, or its embedding is not finite.
    """
    results = []
    for task in tasks:
        bounds = task.inputs.cut(PART_COST * model.groups.dp.size())  # so much is decoded at a time
        parts = [task.inputs.part(range(*pair)) for pair in pairwise(bounds)]
        embeddings = np.concatenate([_embed_part(model, part) for part in parts])  # [inputs, d]
        results.append(score_task(task, embeddings.__getitem__, "first", dist.group.WORLD))
    return results


def _embed_part(model: LoadedModel, part: FileInputs) -> np.ndarray:
    embeddings = embed(model, part)  # [inputs of the part, d]
    require_finite(embeddings, part)
    return embeddings.cpu().numpy()


def score(one: EvaluationSet, embeddings: Tensor, row: dict[str, int], group: dist.ProcessGroup) -> SetResult:
    """Rank one set, its candidates spread over the ranks of `group`.

    Args:
        one: the set.
        embeddings: [inputs, d], the same on every rank.
        row: input key -> row of `embeddings`.
        group: ranks that share the ranking.
    """
    queries = embeddings[[row[key] for key in one.queries]]
    all_candidates = embeddings[[row[key] for key in one.candidates]]
    share = torch.arange(len(one.candidates)).tensor_split(group.size())[group.rank()]
    candidates = all_candidates[share.to(embeddings.device)]
    positives = torch.tensor(one.positives, device=embeddings.device)
    first = int(share[0]) if len(share) else 0
    k = min(TOP_K, len(one.candidates))
    ranking = rank_candidates(queries, candidates, positives, k=k, offset=first, group=group)
    spread = uniformity(all_candidates)
    return SetResult(
        name=one.name,
        meta_task=one.meta_task,
        split=one.split,
        precision_at_1=precision_at_1(ranking, positives),
        chance=one.chance,
        num_queries=len(one.queries),
        num_candidates=len(one.candidates),
        overlap=overlap_coefficient(ranking.positive, ranking.hardest_negative),
        alignment=alignment(ranking.positive),
        uniformity=spread if math.isfinite(spread) else None,
        hub_share=hub_share(ranking.top[:, 0]),
        num_ties=int((ranking.positive == ranking.hardest_negative).sum()),
        positive=ranking.positive.tolist(),
        hardest_negative=ranking.hardest_negative.tolist(),
        top=ranking.top.tolist(),
        positives=one.positives,
        queries=one.queries,
        candidates=one.candidates,
    )
