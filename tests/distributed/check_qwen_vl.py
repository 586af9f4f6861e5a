"""On several ranks: the golden models of the Qwen-VL families at many layouts, embeddings and a step of training.

check_qwen_vl.py FAMILY:LAYOUT ...
LAYOUT is that of check_layouts.py, followed by `full` or `selective` for model.recompute.
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from check_layouts import parse_layout
from full_parameters import full_gradients, let_go
from golden_qwen_vl import GOLDEN, arrays, cases, embedding, gradients, sequence, tile_shape, train_step
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PackedSequences, PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.data.packing import pack_sequences
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_layout
from megatron_llave.distributed.schedule import run_schedule
from megatron_llave.loss import build_loss
from megatron_llave.models import build_model, open_hf
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.models.hf.weights import HfWeights, fill_from_hf
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.optimizer import build_trainable

EMBEDDING_TOLERANCE = 3e-5
HIDDEN_TOLERANCE = 1e-4
LOSS_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 1e-5
SMALL = 1e-6
"""A gradient below this is compared absolutely: that of key biases, which is zero but for rounding."""


def check(family: str, layout: ParallelConfig, freeze: list[str], recompute: str) -> None:
    """Compare embeddings of all cases and the golden step, with its pairs in one micro batch and in three."""
    weights = open_hf(GOLDEN / family)
    model = replace(weights.config.model, freeze=freeze, recompute=recompute)
    validate_layout(model, layout, dist.get_world_size())
    groups = process_groups.initialize_model_parallel(layout)
    frozen = "vision. frozen " if "vision" in freeze else ""
    what = f"{family} {layout} {frozen}recompute={recompute}"
    check_embeddings(filled(model, layout, groups, weights), family, model, layout, groups, what)
    golden = train_step(family)
    loss = LossConfig(temperature=golden["temperature"], alpha=golden["alpha"])
    cfg = RunConfig(model=model, parallel=layout, loss=loss, train=TrainConfig(steps=1, global_batch_size=3))
    trainable = build_trainable(cfg, filled(model, layout, groups, weights), groups)
    for size in (3, 1):
        batches = [pack_pairs(family, golden, start, size, model, layout, groups) for start in range(0, 3, size)]
        batches += [pack_pairs(family, golden, 3, size, model, layout, groups)] * (layout.virtual_pipeline > 1)
        trainable.zero_gradients()
        seen = forward_backward(trainable.chunks, batches, build_loss(loss, groups.dp), loss)
        scale = get_model_config(trainable.chunks[0]).grad_scale_func(torch.ones(()))
        found = {name: gradient / scale for name, gradient in full_gradients(trainable, groups).items()}
        error = check_gradients(found, weights, golden["gradient_norms"], f"{what} micro batch {size}")
        if seen:
            off = abs(float(torch.stack([share for share, _ in seen]).mean()) / golden["loss"] - 1)
            assert off <= LOSS_TOLERANCE, f"{what}: the loss is {off} off"
            print(f"{what} micro batch {size}: loss {off:.1e}, gradients {error:.1e}", flush=True)
    let_go(trainable)


def filled(
    model: ModelConfig, layout: ParallelConfig, groups: ProcessGroupCollection, weights: HfWeights
) -> list[Module]:
    """This rank's chunks with the golden weights."""
    chunks = build_model(model, layout, groups, torch.device("cpu"), seed=None)
    fill_from_hf(chunks, weights, groups)
    return chunks


def packed(
    family: str, names: list[str], model: ModelConfig, layout: ParallelConfig, groups: ProcessGroupCollection
) -> PackedSequences:
    """This rank's part of a row of golden inputs."""
    inputs = [sequence(family, name) for name in names]
    row = pack_sequences(inputs, row_multiple(model, layout), tile_shape(family), layout.context)
    return row.part(groups.cp.rank())


def pack_pairs(
    family: str,
    golden: dict,
    start: int,
    size: int,
    model: ModelConfig,
    layout: ParallelConfig,
    groups: ProcessGroupCollection,
) -> PairBatch:
    """A micro batch of the golden step; one after its end is empty, for schedules that need an even number."""
    queries, targets = (golden[side][start : start + size] for side in ("queries", "targets"))
    numbers = torch.arange(start, start + len(queries))
    sequences = packed(family, [*queries, *targets], model, layout, groups)
    return PairBatch(sequences, numbers, numbers, torch.zeros(0, dtype=torch.int64), "golden", queries)


def check_embeddings(
    chunks: list[Module],
    family: str,
    model: ModelConfig,
    layout: ParallelConfig,
    groups: ProcessGroupCollection,
    what: str,
) -> None:
    """All cases in one row, and a shorter row of texts behind it."""
    texts = [name for name in cases(family) if name.startswith("text")]
    rows, names, hidden = [], [cases(family), texts], []
    if groups.pp.rank() == layout.pipeline - 1 and not layout.sequence and layout.context == 1:
        chunks[-1].language.register_forward_hook(lambda *call: hidden.append(call[-1]))

    def step(items, chunk):
        return chunk(next(items)), lambda output, non_loss_data=True: rows.append(output)

    batches = [packed(family, some, model, layout, groups) for some in names]
    lengths = [sum(batch.padded_lengths) for batch in batches]
    run_schedule(chunks, batches, len(batches), max(lengths), step, forward_only=True)
    if hidden:
        check_hidden_states(hidden[0], family, batches[0].lengths, what)
    for some, row in zip(names, rows):
        off = max((row[place] - embedding(family, name)).abs().max().item() for place, name in enumerate(some))
        assert off <= EMBEDDING_TOLERANCE, f"{what}: embeddings are {off} off"
        print(f"{what}: embeddings {off:.1e}", flush=True)


def check_hidden_states(hidden: Tensor, family: str, lengths: list[int], what: str) -> None:
    """Last hidden states [t, 1, h] of the cases in their order, where they are stored."""
    stored = 0
    for name, own in zip(cases(family), hidden.squeeze(1).split(lengths)):
        golden = arrays(family, name).get("last_hidden_state")
        if golden is not None:
            off = (own - torch.from_numpy(golden)).abs().max().item()
            assert off <= HIDDEN_TOLERANCE, f"{what}: last hidden states of {name} are {off} off"
            stored += 1
    assert stored >= 2


def check_gradients(found: dict[str, Tensor], weights: HfWeights, norms: dict[str, float], what: str) -> float:
    """The norm of every gradient, by transformers' names, and some whole ones; returns the largest difference."""
    hf, layout, model = weights.format, weights.config.layout, weights.config.model
    rules, names = hf.rules(model), {hf.canonical_name(name, layout): name for name in norms}
    whole, worst, seen = gradients(model.family), 0.0, set()
    for name, gradient in found.items():
        for canonical, part in zip(rules[name].names, rules[name].split(gradient)):
            theirs = names[canonical]
            golden, norm = norms[theirs], float(part.double().norm())
            off = abs(norm - golden) / (golden if golden > SMALL else 1)
            if theirs in whole:
                off = max(off, float((part - whole[theirs]).norm() / whole[theirs].norm()))
            assert off <= GRADIENT_TOLERANCE, f"{what}: the gradient of {name} is off by {off}"
            worst = max(worst, off)
            seen.add(theirs)
    frozen = ("visual.blocks", "visual.patch_embed", "visual.pos_embed") if "vision. frozen" in what else ()
    assert {name for name in names.values() if not name.removeprefix("model.").startswith(frozen or "-")} <= seen, what
    return worst


if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(120)
    for argument in sys.argv[1:]:
        kind, text = argument.split(":")
        ways = [way for way in ("full", "selective") if way in text.split(",")]
        check(kind, *parse_layout(text), *(ways or ["none"]))
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()
