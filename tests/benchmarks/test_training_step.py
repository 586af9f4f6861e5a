"""benchmarks/training_step.py: both variants compute the same, and its FLOPs are those that torch counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from benchmarks import released_step, training_step  # noqa: E402
from benchmarks.released_step import embed, packed_work, padded_work, total  # noqa: E402
from megatron_llave.config.schema import RunConfig  # noqa: E402
from megatron_llave.planning.flops import Work, forward_flops  # noqa: E402

SMALL = [
    *("model.vision.hidden_size=32", "model.vision.num_heads=4", "model.vision.ffn_hidden_size=64"),
    *("model.vision.image_size=56", "model.language.hidden_size=48", "model.language.num_heads=4"),
    *("model.language.num_kv_heads=2", "model.language.ffn_hidden_size=80"),
]


@pytest.fixture
def cfg() -> RunConfig:
    return training_step.build_config(layers=2, pairs=4, overrides=SMALL)


@pytest.mark.parametrize("is_mixed", [True, False])
def test_arms_give_the_same_embeddings_and_loss(cfg: RunConfig, groups: ProcessGroupCollection, is_mixed: bool) -> None:
    micro_batches = training_step.make_step(cfg, is_mixed)
    apart = training_step.check(cfg, training_step.Ours(cfg, groups), training_step.Released(cfg), micro_batches)
    assert max(apart) < 2e-5


def test_mixed_step_has_the_shares_of_mmeb(cfg: RunConfig) -> None:
    pairs = [pair for pairs in training_step.make_step(cfg, is_mixed=True) for pair in pairs]
    kinds = [(query.size is not None, target.size is not None) for query, target in pairs]
    assert [kinds.count(kind) for kind in ((True, False), (False, True), (True, True))] == [13, 4, 3]


def test_formula_counts_what_torch_counts(cfg: RunConfig, groups: ProcessGroupCollection) -> None:
    micro_batches = training_step.make_step(cfg, is_mixed=True)
    ours, released = training_step.Ours(cfg, groups), training_step.Released(cfg)
    with counted() as counter, torch.no_grad():
        for pairs in micro_batches:
            for sides in released_step.padded(pairs, cfg.model):
                embed(released.model, sides)
    padded = total([padded_work(pairs) for pairs in micro_batches])
    assert counter.get_total_flops() == forward_flops(cfg.model, whole_squares(padded))
    with counted() as counter:
        ours.embed(ours.prepare(micro_batches))
    work = total([packed_work(pairs) for pairs in micro_batches])
    least, most = (forward_flops(cfg.model, w) for w in (work, whole_squares(whole_squares(whole_squares(work)))))
    assert least < counter.get_total_flops() <= most  # local attention pads within powers of two: up to four squares


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's own kernel is not counted
        yield counter


def whole_squares(work: Work) -> Work:
    """torch counts the half of attention that the mask hides."""
    return Work(work.tokens, 2 * work.squared_lengths, work.tiles)
