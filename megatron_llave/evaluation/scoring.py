"""A benchmark of ranking tasks, as MMEB's: embed what is not there yet, rank each query's own candidates, keep results.

Used by tools/evaluate.py mmeb; training evaluates on the same tasks through score_task. Everything lies in one folder:
embeddings/<set>/ (embedding/cache.py), <set>_result.json, and <set>_pred.txt and <set>_score.json as the released code
writes them. A run that was killed goes on with the parts that are missing; a finished set is only read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.distributed.collectives import all_gather_rows, row_counts
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.cache import (
    EmbeddingCache,
    EmbedParts,
    Identity,
    Progress,
    embed_missing,
    require_same_model,
)
from megatron_llave.errors import DataError
from megatron_llave.evaluation.ranking import alignment, hub_share, rank_own_candidates, uniformity
from megatron_llave.evaluation.task import RankingTask, SetResult
from megatron_llave.files import VERSION, read_json, write_json, write_text
from megatron_llave.loss.similarities import overlap_coefficient

FORMAT = "megatron_llave ranking result"
TIES = ("first", "strict")
TOP_K = 5
"""Candidates per query that a result keeps."""
SAMPLE = 2000
"""Candidates that uniformity is measured on."""

Rows = Callable[[np.ndarray], np.ndarray]
"""Indices of inputs [n] -> their embeddings [n, d] float32."""


@dataclass(frozen=True)
class Done:
    """What one call of evaluate_tasks did, and what was there before."""

    results: list[SetResult]
    num_finished: int
    """Sets that were finished before."""
    num_inputs: int
    """Inputs of the other sets."""
    num_embedded: int
    """Inputs that were embedded by this call, on all ranks."""


def evaluate_tasks(
    embed_parts: EmbedParts,
    tasks: Sequence[RankingTask],
    out: str | Path,
    identity: Identity,
    replicas: dist.ProcessGroup,
    ties: str = "first",
    progress: Progress = lambda what, done, total: None,
) -> Done:
    """Embed, score and write every task that is not finished; the same results on every rank.

    Args:
        embed_parts: of this rank's replica.
        tasks: the data sets, all of them different.
        out: folder for embeddings and results, shared by all ranks.
        identity: of the model; only the first rank's counts.
        replicas: data-parallel ranks that the parts are dealt to.
        ties: see score_task.
        progress: told (what, done, total) of this rank's parts, then of the sets.

    Raises:
        DataError: a picture is missing or damaged, `out` has another model's embeddings, or the disk is full.
    """
    out = Path(out)
    found = _finished(tasks, out, identity, ties)
    waiting = [task for task, result in zip(tasks, found) if result is None]
    stores = {task.name: _store(out, task) for task in waiting}
    num_embedded = embed_missing(embed_parts, list(stores.values()), identity, replicas, progress)
    results = []
    for number, (task, result) in enumerate(zip(tasks, found)):
        progress("scoring", number, len(tasks))
        if result is None:
            store = stores[task.name]
            result = score_task(task, store.rows, ties, dist.group.WORLD)
            if dist.get_rank() == 0:
                about = {"model": identity, "task": task.digest, "files": store.claimed_files, "ties": ties}
                _write(result, task, out, about)
        results.append(result)
    progress("scoring", len(tasks), len(tasks))
    dist.barrier()  # whoever returns finds everything written
    return Done(results, len(tasks) - len(waiting), sum(len(task.inputs) for task in waiting), num_embedded)


def score_task(task: RankingTask, rows: Rows, ties: str, group: dist.ProcessGroup) -> SetResult:
    """Rank every query's own candidates, the queries spread over the ranks of `group`; the same result on all of them.

    Args:
        task: the data set.
        rows: embeddings of its inputs.
        ties: what a query counts whose right candidate is as similar as another one, and none more. first: right, as
            in the released code, where the first maximum wins and the right candidate comes first. strict: wrong. The
            right candidate given twice is no tie.
        group: ranks that share the queries.
    """
    own = torch.arange(len(task.queries)).tensor_split(group.size())[group.rank()].tolist()
    ranked = torch.tensor([_rank(task, query, rows) for query in own], dtype=torch.float64).reshape(-1, 2 + TOP_K)
    [counts] = row_counts(group, ranked.to(device()))
    ranked = all_gather_rows(ranked.to(device()), counts, group).cpu()  # [q, 2 + k]
    positive, hardest, top = ranked[:, 0], ranked[:, 1], ranked[:, 2:].long()
    is_right = positive > hardest if ties == "strict" else positive >= hardest
    right = task.candidates[task.bounds[:-1]]
    shown = np.unique(np.concatenate([right, top[top >= 0].numpy()]))
    place = {int(index): number for number, index in enumerate(shown)}
    candidates = np.unique(task.candidates)
    sample = candidates[np.unique(np.linspace(0, len(candidates) - 1, SAMPLE).round().astype(int))]
    spread = uniformity(torch.from_numpy(rows(sample)), SAMPLE)
    return SetResult(
        name=task.name,
        meta_task=task.meta_task,
        split=task.split,
        precision_at_1=100.0 * int(is_right.sum()) / len(right),
        chance=float(np.mean(100.0 / np.diff(task.bounds))),
        num_queries=len(right),
        num_candidates=len(candidates),
        overlap=overlap_coefficient(positive, hardest),
        alignment=alignment(positive),
        uniformity=spread if math.isfinite(spread) else None,
        hub_share=hub_share(top[:, 0]),
        num_ties=int((positive == hardest).sum()),
        positive=positive.tolist(),
        hardest_negative=hardest.tolist(),
        top=[[place.get(index, -1) for index in row] for row in top.tolist()],
        positives=[place[index] for index in right.tolist()],
        queries=[task.inputs.key(index) for index in task.queries.tolist()],
        candidates=[task.inputs.key(index) for index in shown.tolist()],
    )


def _rank(task: RankingTask, query: int, rows: Rows) -> list[float]:
    """Similarity of the right candidate and of the hardest other, then the best candidates by index of the input."""
    candidates = task.candidates_of(query)
    embedded = torch.from_numpy(rows(np.concatenate([task.queries[query : query + 1], candidates]))).to(device())
    similarity, top = rank_own_candidates(embedded[0], embedded[1:], TOP_K)
    is_other = torch.from_numpy(candidates != candidates[0]).to(similarity.device)
    hardest = similarity[is_other].max().item() if is_other.any() else -math.inf
    best = candidates[top.cpu().numpy()].tolist()
    return [similarity[0].item(), hardest, *best, *[-1] * (TOP_K - len(best))]


def _finished(tasks: Sequence[RankingTask], out: Path, identity: Identity, ties: str) -> list[SetResult | None]:
    """Results that lie in `out` already, as the first rank finds them.

    Raises:
        DataError: one is of another model.
    """
    found = [None] * len(tasks)
    if dist.get_rank() == 0:
        found = [_read(task, out, identity, ties) for task in tasks]
    # What the first rank has read is everyone's: on a network file system the others might find something else.
    dist.broadcast_object_list(found, 0, device=device())
    return found


def _read(task: RankingTask, out: Path, identity: Identity, ties: str) -> SetResult | None:
    """The finished result, if it is of this task with its files as they are now.

    Raises:
        DataError: it is of another model.
    """
    path = out / f"{task.name}_result.json"
    if not path.is_file() or not _score_file(out, task).is_file():
        return None
    try:
        found = read_json(path, FORMAT, "")
        model, about = found["model"], (found["task"], found["files"], found["ties"])
        result = SetResult(**found["result"])
        result.hardest_negative = [-math.inf if x is None else x for x in result.hardest_negative]
        lists = (result.positive, result.hardest_negative, result.top, result.positives, result.queries)
        is_whole = all(len(one) == result.num_queries for one in lists)
    except (DataError, KeyError, TypeError):
        return None  # damaged: it is made again from the embeddings
    require_same_model(path, model, identity)
    is_same = about == (task.digest, _store(out, task).digest_of_files(), ties)
    return result if is_whole and is_same else None


def _write(result: SetResult, task: RankingTask, out: Path, about: dict[str, Any]) -> None:
    """The released code's two files, and all numbers; the score last, which makes the set a finished one."""
    best = [result.candidates[row[0]] for row in result.top]
    predicted = [task.inputs.inputs[task.inputs.index(key)] for key in best]
    try:
        _score_file(out, task).unlink(missing_ok=True)
        hardest = [x if math.isfinite(x) else None for x in result.hardest_negative]  # JSON has no infinity
        values = {**asdict(result), "hardest_negative": hardest}
        write_json(out / f"{task.name}_result.json", {"format": FORMAT, "version": VERSION, **about, "result": values})
        lines = (f"{(one.text, ''.join(one.images))}\n" for one in predicted)
        write_text(out / f"{task.name}_pred.txt", "".join(lines))
        correct = round(result.precision_at_1 * result.num_queries / 100)
        score = {"acc": correct / result.num_queries, "num_correct": correct, "num_pred": result.num_queries}
        write_json(_score_file(out, task), score)
    except OSError as error:
        raise DataError(f"{out}: results of {task.name} cannot be written: {error.strerror}") from error


def _store(out: Path, task: RankingTask) -> EmbeddingCache:
    return EmbeddingCache(out / "embeddings" / task.name, task.inputs)


def _score_file(out: Path, task: RankingTask) -> Path:
    return out / f"{task.name}_score.json"
