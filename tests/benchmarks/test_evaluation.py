"""benchmarks/evaluation.py: both variants give the same embeddings, and the table counts what it should."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

pytest.importorskip("transformers")

from benchmarks import evaluation  # noqa: E402
from benchmarks.released_step import make_side  # noqa: E402
from benchmarks.training_step import build_config  # noqa: E402
from megatron_llave.planning.flops import Work  # noqa: E402

SMALL = [
    *("model.vision.hidden_size=32", "model.vision.num_heads=4", "model.vision.ffn_hidden_size=64"),
    *("model.vision.image_size=56", "model.language.hidden_size=48", "model.language.num_heads=4"),
    *("model.language.num_kv_heads=2", "model.language.ffn_hidden_size=80"),
]


def test_table(groups: ProcessGroupCollection, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.run(Namespace(layers=1, queries=3, per_query=2, repeats=1, overrides=SMALL))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [
        ["labels", "9", "3"],
        ["captions", "9", "3"],
        ["answers", "9", "3"],
        ["images", "6", "3"],
        ["all", "33", "12"],
    ]
    for row in rows:
        ours, released, ratio, flops = map(float, row[3:7])
        assert ratio == pytest.approx(ours / released, rel=0.02) and flops > 1
        assert float(row[8]) < evaluation.TOLERANCE


def test_padded_work_is_four_times_the_longest_and_a_tile_for_each_text() -> None:
    cfg = build_config(1, 4, SMALL)
    rng = np.random.default_rng(0)
    sides = [make_side(cfg.model, has_image, rng) for has_image in (True, False, False, False, False, True)]
    lengths, tiles = [side.sequence.length for side in sides], [side.num_tiles for side in sides]
    assert evaluation.work_of(sides, is_padded=False) == Work(sum(lengths), sum(n * n for n in lengths), sum(tiles))
    first, second = max(lengths[:4]), max(lengths[4:])
    padded = Work(4 * first + 2 * second, 4 * first**2 + 2 * second**2, sum(tiles) + 4)
    assert evaluation.work_of(sides, is_padded=True) == padded


def test_a_difference_of_the_arms_is_an_error(groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evaluation.embed_ours
    monkeypatch.setattr(evaluation, "embed_ours", lambda *given: own(*given) + torch.tensor(1e-3))
    with pytest.raises(AssertionError, match=r"embeddings are 0\.00.* apart, more than 0\.0001"):
        evaluation.run(Namespace(layers=1, queries=1, per_query=1, repeats=1, overrides=SMALL))
