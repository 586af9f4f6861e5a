"""benchmarks/qwen_vl_step.py: both variants compute the same, and ours needs fewer operations."""

from functools import partial

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

pytest.importorskip("transformers")

from benchmarks import training_step  # noqa: E402
from benchmarks.qwen_vl_step import PRESETS, Plain, build_config, counted_flops, make_side, tile_shape  # noqa: E402

SMALL = [
    *("model.vision.hidden_size=32", "model.vision.num_heads=2", "model.vision.ffn_hidden_size=64"),
    *("model.language.hidden_size=64", "model.language.num_heads=4", "model.language.num_kv_heads=2"),
    *("model.language.head_size=16", "model.language.ffn_hidden_size=80", "model.language.mrope_section=[4,2,2]"),
    "data.max_pixels=20000",
]


@pytest.mark.parametrize("family", PRESETS)
def test_both_variants_compute_the_same(family: str, groups: ProcessGroupCollection) -> None:
    cfg = build_config(family, layers=2, pairs=2, overrides=SMALL)
    micro_batches = training_step.make_step(cfg, True, make=partial(make_side, cfg.data))
    ours, plain = training_step.Ours(cfg, groups, tile_shape(cfg.model)), Plain(cfg)
    assert max(training_step.check(cfg, ours, plain, micro_batches)) < 2e-5
    flops = counted_flops(training_step.steps_of(ours, plain, micro_batches))
    assert flops["released"] > 1 and flops["ours, global_batch"] > 1.2  # another forward pass is a third more
