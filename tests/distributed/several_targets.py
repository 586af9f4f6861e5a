"""Four queries with eight targets, four hard negatives and scores, for check_layouts.py: the step that has it all."""

from dataclasses import replace

import torch
from reference import dense_contrastive_loss, dense_cosent_loss, dense_soft_label_loss, pack, random_pairs
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import EncodedSequence
from megatron_llave.loss.inputs import PairEmbeddings

ROWS, HARD_ROWS = [0, 0, 1, 2, 2, 2, 3, 3], [0, 0, 3, 3]
"""The query that each target and each hard negative belongs to."""
IDS = torch.arange(4), torch.tensor([0, 1, 0, 3, 4, 5, 1, 7]), torch.tensor([20, 3, 22, 23])
"""Of queries, targets and hard negatives; some are the same."""
SCORES = torch.tensor([0.5, 2.0, torch.nan, torch.nan, torch.nan, torch.nan, 1.0, 0.0, -1.0, 0.5, 0.0, 3.0])
"""Of targets and hard negatives."""
OBJECTIVES = {"several": {"soft_labels": "scores"}, "cosent": {"objective": "cosent"}}
"""Name of a loss -> what it changes in the section `loss`."""


def losses(embeddings: Tensor, hard: Tensor, temperature: float, alpha: float) -> dict[str, Tensor]:
    """The losses of OBJECTIVES; `embeddings` [16, d] are of random_pairs, query and target in turn."""
    rows = PairEmbeddings(embeddings[0:8:2], embeddings[1::2], hard, torch.tensor(ROWS), torch.tensor(HARD_ROWS))
    several = dense_contrastive_loss(rows.query, rows.target, temperature, alpha, hard, *IDS, rows=ROWS)
    soft = dense_soft_label_loss(rows, SCORES, torch.tensor(temperature), LossConfig())
    return {"several": several + soft, "cosent": dense_cosent_loss(rows, SCORES, temperature)}


def pack_part(cfg: RunConfig, rows: range, multiple: int, hard_negatives: list[EncodedSequence]) -> PairBatch:
    """A micro batch of some of the queries."""
    targets, hard = ([place for place, row in enumerate(owners) if row in rows] for owners in (ROWS, HARD_ROWS))
    pairs = random_pairs(cfg.model, len(ROWS))
    sides = [pairs[row][0] for row in rows] + [pairs[place][1] for place in targets]
    sides += [hard_negatives[place] for place in hard]
    row = pack(sides, cfg.model, multiple, cfg.parallel.context)
    ids = [ids[torch.tensor(chosen, dtype=torch.int64)] for ids, chosen in zip(IDS, (list(rows), targets, hard))]
    batch = PairBatch(row, *ids, "random", [str(place) for place in rows])
    owners = (torch.tensor([row - rows.start for row in part if row in rows]).long() for part in (ROWS, HARD_ROWS))
    scores = SCORES[torch.tensor(targets + [len(ROWS) + place for place in hard], dtype=torch.int64)]
    return replace(batch, scores=scores, **dict(zip(("target_rows", "hard_rows"), owners)))
